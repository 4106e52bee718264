"""Files of a store (http, https, and whatever fsspec knows: s3, gs, hf, ...): copied whole, or read in parts.

Copies lie in a cache of bounded size. Beside each lies a small file that says what the store's file was, and stays when
the copy is removed to make room: the file is then read from the store, part by part.
"""

from __future__ import annotations

import http.client
import json
import os
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from diptych.core import environment, web
from diptych.core.errors import UserError
from diptych.core.files import write_bytes, write_json

LIMIT = "DIPTYCH_SHARDS_BYTES"
"""Environment variable: bytes that copies of shards may take; without it all are kept."""
_CHUNK = 1 << 20
_TIMEOUT_SECONDS = 60
_WEB = ("http", "https")


@dataclass(frozen=True)
class Remote:
    """A file of a store as it was when it was copied. time: of its copy, in nanoseconds. version: what the store calls
    this state of it (an ETag); "" where it does not say."""

    url: str
    size: int
    time: int
    version: str = ""

    def read(self, offset: int, length: int) -> bytes:
        """A part of it.

        Raises:
            UserError: the store does not answer, gives no parts, or has another file there now.
        """
        with _answering(self.url):
            if scheme_of(self.url) in _WEB:
                return self._read_web(offset, length)
            system, path = file_system(self.url)
            if system.size(path) != self.size:
                raise UserError(f"{web.shown_url(self.url)}: the file has changed since it was indexed; start again")
            return system.cat_file(path, start=offset, end=offset + length)

    def _read_web(self, offset: int, length: int) -> bytes:
        asked = urllib.request.Request(self.url, headers={"Range": f"bytes={offset}-{offset + length - 1}"})
        with web.opener(redirects=True).open(asked, timeout=_TIMEOUT_SECONDS) as response:
            if response.status != 206:
                raise UserError(f"{web.shown_url(self.url)}: the server gives no parts of files; raise {LIMIT}")
            total = (response.headers.get("Content-Range") or "").rpartition("/")[2]
            if total != str(self.size) or (response.headers.get("ETag") or "") != self.version:
                raise UserError(f"{web.shown_url(self.url)}: the file has changed since it was indexed; start again")
            return b"".join(_whole(response, self.url))


def scheme_of(name: str) -> str:
    """ "s3" of s3://bucket/file; "" of a path."""
    return urllib.parse.urlsplit(name).scheme if "://" in name else ""


def file_system(url: str) -> tuple[Any, str]:
    """fsspec's file system of an address, and the path in it; UserError where no library for it is installed."""
    import fsspec

    try:
        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise UserError(f"{web.shown_name(url)}: {error}") from error
    except ValueError as error:
        raise UserError(f"{web.shown_name(url)}: no store of this kind is known ({error})") from error


def matches(pattern: str) -> list[str]:
    """The addresses in a store that a pattern with `*` names, in order; a name without one as it is."""
    if scheme_of(pattern) in _WEB or not any(mark in pattern for mark in "*?["):
        return [pattern]
    with _answering(pattern):
        system, path = file_system(pattern)
        addresses = sorted(system.unstrip_protocol(each) for each in system.glob(path))
    if not addresses:
        raise UserError(f"{web.shown_name(pattern)}: no such file in the store")
    return addresses


def copy(url: str, path: Path) -> Remote:
    """Copy a file of a store to `path`, whole or not at all, and note what it was beside it.

    Raises:
        UserError: the store does not answer, refuses, or stops half-way; or the disk is full.
    """
    version = ""
    with _answering(url):
        if scheme_of(url) in _WEB:
            with web.opener(redirects=True).open(url, timeout=_TIMEOUT_SECONDS) as response:
                version = response.headers.get("ETag") or ""
                write_bytes(path, _whole(response, url))
        else:
            system, inner = file_system(url)
            size = system.size(inner)
            with system.open(inner, "rb") as stream:
                write_bytes(path, iter(lambda: stream.read(_CHUNK), b""))
            if size is not None and path.stat().st_size != size:
                received = path.stat().st_size
                path.unlink()
                raise UserError(f"{web.shown_url(url)}: the download broke off after {received:,} of {size:,} bytes")
    stat = path.stat()
    remote = Remote(url, stat.st_size, stat.st_mtime_ns, version)
    write_json(note_of(path), asdict(remote))
    return remote


def note_of(path: Path) -> Path:
    """Where it is said of a copy what it is a copy of."""
    return path.with_name(f"{path.name}.remote.json")


def remote_of(path: Path) -> Remote | None:
    """What a copy is, or was, a copy of; None for a file that is none."""
    try:
        return Remote(**json.loads(note_of(path).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def limit() -> int | None:
    """Bytes that copies may take; None for any number. UserError for a value that is no number."""
    return environment.number(LIMIT, 0) if os.environ.get(LIMIT) else None


def make_room(folder: Path, limit: int | None) -> None:
    """Remove copies below a cache folder, the oldest first, until they take at most so many bytes."""
    if limit is None:
        return
    copies = [path.with_name(path.name.removesuffix(".remote.json")) for path in folder.rglob("*.remote.json")]
    there = sorted((path.stat().st_mtime_ns, path.stat().st_size, path) for path in copies if path.exists())
    total = sum(size for _, size, _ in there)
    for _, size, path in there:
        if total <= limit:
            return
        path.unlink(missing_ok=True)
        total -= size


@contextmanager
def _answering(url: str) -> Iterator[None]:
    """What a store does wrong, in one line that names it."""
    shown = web.shown_name(url)
    try:
        yield
    except UserError:
        raise
    except urllib.error.HTTPError as error:
        with error:
            raise UserError(f"{shown}: the server answered {error.code} {error.reason}") from error
    except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
        reason = getattr(error, "reason", None) or type(error).__name__
        raise UserError(f"{shown}: cannot be downloaded ({reason})") from error
    except FileNotFoundError as error:
        raise UserError(f"{shown}: no such file in the store") from error
    except PermissionError as error:
        raise UserError(f"{shown}: the store refuses ({web.redacted(str(error)).splitlines()[0]})") from error
    except Exception as error:  # a store's library raises errors of its own kinds
        if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.filename):
            raise
        lines = web.redacted(str(error)).splitlines() or [""]
        raise UserError(f"{shown}: the store does not answer ({type(error).__name__}: {lines[0]})") from error


def _whole(response: http.client.HTTPResponse, url: str) -> Iterator[bytes]:
    """The body in chunks; an error when it ends early, so that no partial file is ever renamed into place."""
    expected = response.headers.get("Content-Length")
    received = 0
    while chunk := response.read(_CHUNK):
        received += len(chunk)
        yield chunk
    if expected is not None and received != int(expected):
        shown = web.shown_url(url)
        raise UserError(f"{shown}: the download broke off after {received:,} of {int(expected):,} bytes; try again")
