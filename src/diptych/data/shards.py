"""Tar shards by the words that name them: patterns, and copies of what lies at a URL."""

from __future__ import annotations

import glob
import hashlib
import itertools
import math
import os
import re
import urllib.parse
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from diptych.core import web
from diptych.core.errors import UserError
from diptych.core.filenames import file_name
from diptych.data import stores
from diptych.data.tar_index import keep_part, part_beside
from diptych.data.tar_scan import scan

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
    """Paths on this machine of the shards that one string names; of those in a store, where their copies lie or lay."""
    for name in expand(shard):
        if "://" in name:
            yield from (_copied(url, cache) for url in stores.matches(name))
            continue
        path = os.path.expanduser(name)
        matches = [path] if os.path.isfile(path) else sorted(glob.glob(path, recursive=True))
        if not matches:
            raise UserError(f"{name}: no such shard")
        yield from (Path(match) for match in matches)


def _copied(url: str, cache: Path) -> Path:
    """The place of a shard's copy in `cache`; it is fetched when it was not yet, and indexed before it makes room."""
    base = file_name(os.path.basename(urllib.parse.urlsplit(url).path) or "shard.tar")
    path = cache / hashlib.blake2b(url.encode(), digest_size=8).hexdigest() / base
    if path.is_file() or (stores.remote_of(path) is not None and part_beside(path).is_file()):
        return path
    part_beside(path).unlink(missing_ok=True)
    stores.copy(url, path)
    # What a store sent may be a page that says so, or half of a shard of a length that it did not tell.
    try:
        listing = scan(path)
    except UserError as error:
        path.unlink()
        stores.note_of(path).unlink()
        why = str(error).removeprefix(f"{path}: ")
        raise UserError(f"{web.shown_url(url)}: what the store sent is no whole shard ({why}); start again") from error
    keep_part(listing, path, part_beside(path))
    stores.make_room(cache, stores.limit())
    return path


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
