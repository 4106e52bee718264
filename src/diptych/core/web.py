"""Requests that carry a key: it is checked before it is used, follows no redirect, and stands in no message."""

from __future__ import annotations

import os
import re
import urllib.parse
import urllib.request
from collections.abc import Iterable, Mapping
from http.client import HTTPMessage
from typing import IO

from diptych.core.errors import UserError

REMOVED = "[key removed]"
_SECRET_NAME = re.compile(r"(?i)(^|_)(api_?key|key|token|secret|password)$")
_SHAPED = re.compile(r"(?i)(bearer\s+|\bsk-|\bhf_)[\w.~+/=-]{8,}")
SHORTEST = 6
"""Characters of a value that is taken for a secret; shorter ones occur in ordinary words."""


def key_from(name: str) -> str:
    """The key in an environment variable, without the white space around it that mounted secrets end in.

    Raises:
        UserError: a character inside it cannot stand in an HTTP header. The message tells where, and not what.
    """
    key = os.environ.get(name, "").strip()
    return checked_key(key, name)


def checked_key(key: str, name: str) -> str:
    """The stripped key, if it can stand in an HTTP header; as `key_from`."""
    key = key.strip()
    bad = next((place for place, letter in enumerate(key) if not "!" <= letter <= "~"), None)
    if bad is not None:
        letter = key[bad]
        kind = "white space" if letter.isspace() else "not ASCII" if letter > "~" else "a control character"
        raise UserError(f"{name}: character {bad + 1} of the key is {kind}; a key is one line of visible ASCII")
    return key


def secrets(environment: Mapping[str, str] | None = None) -> list[str]:
    """Values of environment variables that are named like secrets (..._KEY, ..._TOKEN, ...), longest first."""
    values = {
        value.strip()
        for name, value in (os.environ if environment is None else environment).items()
        if _SECRET_NAME.search(name) and len(value.strip()) >= SHORTEST
    }
    return sorted(values, key=len, reverse=True)


def redacted(text: str, keys: Iterable[str] = ()) -> str:
    """`text` without these keys, without values of secret environment variables, and without what looks like a key."""
    return _SHAPED.sub(REMOVED, without_keys(text, (*keys, *secrets())))


def without_keys(text: str, keys: Iterable[str]) -> str:
    """`text` without these keys, plain or as a URL or `repr` writes them."""
    for key in keys:
        if len(key) < SHORTEST:
            continue
        for form in {key, urllib.parse.quote(key, safe=""), repr(key)[1:-1], repr(key.encode())[2:-1]}:
            text = text.replace(form, REMOVED)
    return text


def shown_url(url: str) -> str:
    """An address without what may be secret in it: user, password, query and fragment."""
    try:
        parts = urllib.parse.urlsplit(url)
        host = parts.hostname or ""
        port = f":{parts.port}" if parts.port else ""
    except ValueError:
        return "(an address that cannot be read)"
    if not parts.scheme or not host:
        return "(an address that cannot be read)"
    hidden = "?..." if parts.query else ""
    return redacted(f"{parts.scheme}://{host}{port}{parts.path}{hidden}")


def shown_name(name: str) -> str:
    """A name of a file as it is, and an address as `shown_url` shows it; of one that another wraps
    (`simplecache::s3://...`) each part."""
    if "://" not in name:
        return name
    *wrappers, address = name.split("::")
    return "::".join(
        [*(part if re.fullmatch(r"\w+", part) else shown_name(part) for part in wrappers), shown_url(address)]
    )


def checked_url(url: str, option: str) -> str:
    """An http or https address with a host and without user, password or fragment.

    Raises:
        UserError: otherwise; the address is not repeated, since it may hold a key.
    """
    try:
        parts = urllib.parse.urlsplit(url.strip())
        _ = parts.port
    except ValueError as error:
        raise UserError(f"{option}: the address cannot be read") from error
    if parts.scheme not in ("http", "https"):
        raise UserError(
            f"{option}: an address begins with http:// or https://; a model of this machine with hf: or diptych:"
        )
    if parts.username is not None or parts.password is not None:
        raise UserError(f"{option}: a key or password does not belong in the address; put it in OPENAI_API_KEY")
    if not parts.hostname or parts.fragment or not re.fullmatch(r"[!-~]+", url.strip()):
        raise UserError(f"{option}: the address cannot be read; write it as https://host/v1")
    return url.strip()


class NoRedirects(urllib.request.HTTPRedirectHandler):
    """Leaves a redirect to the caller, as an `HTTPError` of its status."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> None:
        return None


class SecureRedirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects of downloads, but never from https to http, and takes no credentials to another host."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> urllib.request.Request | None:
        before, after = urllib.parse.urlsplit(req.full_url), urllib.parse.urlsplit(newurl)
        if before.scheme == "https" and after.scheme != "https":
            return None
        request = super().redirect_request(req, fp, code, msg, headers, newurl)
        if request is not None and (before.scheme, before.netloc) != (after.scheme, after.netloc):
            for name in ("Authorization", "Cookie", "X-api-key", "Api-key"):
                request.remove_header(name)
        return request


def opener(*, redirects: bool) -> urllib.request.OpenerDirector:
    """What opens addresses: with `SecureRedirects`, or with `NoRedirects`."""
    return urllib.request.build_opener(SecureRedirects() if redirects else NoRedirects())
