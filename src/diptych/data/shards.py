"""Tar shards by the words that name them: patterns, and copies of what lies at a URL."""

from __future__ import annotations

import glob
import hashlib
import http.client
import itertools
import math
import os
import re
import urllib.error
import urllib.parse
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from diptych.core import web
from diptych.core.errors import UserError
from diptych.core.filenames import file_name
from diptych.core.files import write_bytes

_CHUNK = 1 << 20
_TIMEOUT_SECONDS = 60
MOST = 1_000_000
"""Shards that a pattern may name."""
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


def expand(pattern: str) -> list[str]:
    """`{000..012}` and `{a,b}` written out, in order; other text unchanged."""
    pieces = _BRACES.split(pattern)  # text, inside, text, inside, ..., text
    choices = [[piece] if place % 2 == 0 else _choices(piece, pattern) for place, piece in enumerate(pieces)]
    if math.prod(len(each) for each in choices) > MOST:
        raise UserError(f"{web.shown_name(pattern)}: names more than {MOST:,} shards")
    return ["".join(choice) for choice in itertools.product(*choices)]


def _choices(inside: str, pattern: str) -> list[str]:
    span = _RANGE.fullmatch(inside)
    if span is None:
        return inside.split(",") if "," in inside else ["{" + inside + "}"]
    first, last = span.groups()
    if max(len(first), len(last)) > 18 or int(last) - int(first) >= MOST:
        raise UserError(f"{web.shown_name(pattern)}: names more than {MOST:,} shards")
    return [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]


def local_shards(shard: str, cache: Path) -> Iterator[Path]:
    """Paths on this machine of the shards that one string names."""
    for name in expand(shard):
        if urllib.parse.urlsplit(name).scheme in ("http", "https"):
            yield _download(name, cache)
            continue
        if "://" in name:
            raise UserError(f"{web.shown_name(name)}: only http and https shards can be downloaded")
        path = os.path.expanduser(name)
        matches = [path] if os.path.isfile(path) else sorted(glob.glob(path, recursive=True))
        if not matches:
            raise UserError(f"{name}: no such shard")
        yield from (Path(match) for match in matches)


def _download(url: str, cache: Path) -> Path:
    """The shard's copy in `cache`, fetched when it is not there yet."""
    base = file_name(os.path.basename(urllib.parse.urlsplit(url).path) or "shard.tar")
    path = cache / hashlib.blake2b(url.encode(), digest_size=8).hexdigest() / base
    if path.is_file():
        return path
    try:
        with web.opener(redirects=True).open(url, timeout=_TIMEOUT_SECONDS) as response:
            write_bytes(path, _whole(response, url))
    except urllib.error.HTTPError as error:
        with error:
            raise UserError(f"{web.shown_name(url)}: the server answered {error.code} {error.reason}") from error
    except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
        reason = getattr(error, "reason", None) or type(error).__name__
        raise UserError(f"{web.shown_name(url)}: cannot be downloaded ({reason})") from error
    return path


def _whole(response: http.client.HTTPResponse, url: str) -> Iterator[bytes]:
    """The body in chunks; an error when it ends early, so that no partial shard is ever renamed into place."""
    expected = response.headers.get("Content-Length")
    received = 0
    while chunk := response.read(_CHUNK):
        received += len(chunk)
        yield chunk
    if expected is not None and received != int(expected):
        raise UserError(f"{url}: the download broke off after {received:,} of {int(expected):,} bytes; try again")


def shard_names(shards: Sequence[Path]) -> list[str]:
    """What ids call the shards: file names, or, where two are the same, paths below the folder that holds them all.

    Raises:
        UserError: a shard is given twice.
    """
    whole = [os.path.abspath(path) for path in shards]
    for path, count in Counter(whole).items():
        if count > 1:
            raise UserError(f"{path}: this shard is given {count} times; give it once, with a greater weight")
    names = [path.name for path in shards]
    if len(set(names)) == len(names):
        return names
    above = os.path.commonpath([os.path.dirname(path) for path in whole])
    return [os.path.relpath(path, above).replace(os.sep, "/") for path in whole]


def cache_folder(cache: str | Path | None) -> Path:
    if cache is not None:
        return Path(cache).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "diptych" / "shards"


def short_name(given: Sequence[str]) -> str:
    return os.path.basename(urllib.parse.urlsplit(given[0]).path) if given else "shards"
