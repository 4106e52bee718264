"""WebDataset tar shards, read at random by the offsets of their members."""

from __future__ import annotations

import glob
import hashlib
import http.client
import itertools
import json
import os
import re
import urllib.error
import urllib.parse
import urllib.request
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from diptych.core.errors import UserError
from diptych.core.files import write_bytes
from diptych.core.sample import Sample
from diptych.data.filters import Scored
from diptych.data.imaging import SUFFIXES, FitMode, check_fit, image_size, read_image
from diptych.data.rows import Row, make_sample, parse_row, usable_text
from diptych.data.source import BadItem, ItemDraws, Size, Source, check_task, describe, file_stamp
from diptych.data.tar_scan import scan

_APART = "members of its name stand elsewhere in the shard; those of one sample must follow each other"
_CHUNK = 1 << 20
_TIMEOUT_SECONDS = 60
_IMAGES = frozenset(suffix.lstrip(".") for suffix in SUFFIXES)
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


@dataclass(frozen=True)
class _Member:
    shard: int
    offset: int
    length: int


@dataclass(frozen=True)
class _Group:
    """The members of one sample, those that are read."""

    key: str
    image: _Member | None
    text: _Member | None
    json: _Member | None
    again: bool
    """The key comes elsewhere in the shard too."""


class WebDatasetSource(Source, Scored):
    """Samples of tar shards: members that follow each other and share a name up to its first dot are one sample
    (`tar_scan`).

    - `image`: an image
    - `text_to_image`: an image and a .txt, or a .json with "text" or "caption"
    - `understand`: a .json with "conversations" or "messages", and an image where they hold `<image>`

    Shards at a URL are downloaded whole, once, into `cache`. A sample without what its task needs is dropped and
    counted.

    Args:
        shards: path, glob, http(s) URL, or several; `{000..012}` and `{a,b}` expand.
        fit: `crop` or `letterbox`.
        cache: folder for downloads; ~/.cache/diptych/shards by default.

    Raises:
        UserError: no shard found, a shard is no tar, truncated or compressed, a download fails, or nothing is usable.
    """

    def __init__(
        self,
        shards: str | Path | Sequence[str | Path],
        *,
        task: str = "text_to_image",
        fit: str = "crop",
        cache: str | Path | None = None,
        name: str | None = None,
    ) -> None:
        given = [str(shards)] if isinstance(shards, str | Path) else [str(shard) for shard in shards]
        self.name = name or _short_name(given)
        self.task = check_task(task, ("image", "text_to_image", "understand"), self.name)
        self.fit: FitMode = check_fit(fit, self.name)
        self.shards = [path for shard in given for path in _local(shard, _cache_folder(cache))]
        if not self.shards:
            raise UserError(f"{self.name}: no shards given")
        self._stamps = [file_stamp(path) for path in self.shards]
        self._names = _shard_names(self.shards)
        self._groups: list[_Group] = []
        dropped: dict[str, str] = {}
        for number, path in enumerate(self.shards):
            groups, left_out = _index(path, number)
            dropped |= {self._id(number, name): reason for name, reason in left_out}
            for group in groups:
                reason = self._lacks(group)
                if reason is None:
                    self._groups.append(group)
                else:
                    dropped[self._id(number, group.key)] = reason
        self.dropped: Mapping[str, str] = dropped
        if not self._groups:
            first = f" (first: {next(iter(dropped.items()))})" if dropped else ""
            raise UserError(f"{self.name}: no usable sample for task {self.task!r} in {len(self.shards)} shards{first}")

    def __len__(self) -> int:
        return len(self._groups)

    def load(self, index: int, draws: ItemDraws, size: Size) -> Sample:
        group = self._groups[index]
        id = self._group_id(group)

        def read(reference: _Member, least: Size) -> Image.Image:
            return read_image(self._bytes(reference), id, least)

        return make_sample(
            self._row(group, id), id=id, task=self.task, read=read, draws=draws, size=size, fit_mode=self.fit
        )

    def sizes(self) -> Sequence[Size | None] | None:
        return None if self.task == "understand" else [self._size(group) for group in self._groups]

    def fingerprint(self, index: int) -> str:
        group = self._groups[index]
        member = group.image
        if member is None:
            return f"{self._group_id(group)}:no image"
        return f"{self._stamps[member.shard]}:{member.offset}:{member.length}:{self.fit}"

    def describe(self) -> str:
        return describe(self)

    def column(self, index: int, name: str) -> object:
        group = self._groups[index]
        return None if group.json is None else _object(self._bytes(group.json), self._group_id(group)).get(name)

    def _id(self, shard: int, key: str) -> str:
        return f"{self.name}/{self._names[shard]}/{key}"

    def _group_id(self, group: _Group) -> str:
        member = group.image or group.json
        assert member is not None, "a listed group has an image or a conversation"
        return self._id(member.shard, group.key)

    def _lacks(self, group: _Group) -> str | None:
        if self.task == "understand":
            missing = None if group.json else "no .json"
        elif group.image is None:
            missing = "no image"
        else:
            missing = None if self.task == "image" or group.text or group.json else "no caption"
        return f"{missing}; {_APART}" if missing and group.again else missing

    def _row(self, group: _Group, id: str) -> Row:
        if self.task == "image":
            return Row(target=group.image)
        if self.task == "text_to_image" and group.text:
            return Row(target=group.image, texts=(usable_text(_text(self._bytes(group.text), id), id),))
        assert group.json is not None
        fields = _object(self._bytes(group.json), id)
        if self.task == "understand":
            turns = {name: fields[name] for name in ("conversations", "messages") if name in fields}
            row = {**turns, "images": [group.image] if group.image else []}
        else:
            row = {"image": group.image, "text": fields.get("text", fields.get("caption"))}
        try:
            return parse_row(row, self.task, id, (_Member,))
        except UserError as error:
            raise BadItem(id, str(error).removeprefix(f"{id}: ")) from error

    def _size(self, group: _Group) -> Size | None:
        assert group.image is not None
        try:
            return image_size(self._bytes(group.image), self._group_id(group))
        except BadItem:
            return None

    def _bytes(self, member: _Member) -> bytes:
        with self.shards[member.shard].open("rb") as file:
            file.seek(member.offset)
            return file.read(member.length)


def expand(pattern: str) -> list[str]:
    """`{000..012}` and `{a,b}` written out, in order; other text unchanged."""
    pieces = _BRACES.split(pattern)  # text, inside, text, inside, ..., text
    choices = [[piece] if place % 2 == 0 else _choices(piece) for place, piece in enumerate(pieces)]
    return ["".join(choice) for choice in itertools.product(*choices)]


def _choices(inside: str) -> list[str]:
    span = _RANGE.fullmatch(inside)
    if span is None:
        return inside.split(",") if "," in inside else ["{" + inside + "}"]
    first, last = span.groups()
    return [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]


def _local(shard: str, cache: Path) -> Iterator[Path]:
    """Paths on this machine of the shards that one string names."""
    for name in expand(shard):
        if urllib.parse.urlsplit(name).scheme in ("http", "https"):
            yield _download(name, cache)
            continue
        if "://" in name:
            raise UserError(f"{name}: only http and https shards can be downloaded")
        path = os.path.expanduser(name)
        matches = [path] if os.path.isfile(path) else sorted(glob.glob(path, recursive=True))
        if not matches:
            raise UserError(f"{name}: no such shard")
        yield from (Path(match) for match in matches)


def _download(url: str, cache: Path) -> Path:
    """The shard's copy in `cache`, fetched when it is not there yet."""
    base = os.path.basename(urllib.parse.urlsplit(url).path) or "shard.tar"
    path = cache / hashlib.blake2b(url.encode(), digest_size=8).hexdigest() / base
    if path.is_file():
        return path
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT_SECONDS) as response:
            write_bytes(path, _whole(response, url))
    except urllib.error.HTTPError as error:
        with error:
            raise UserError(f"{url}: the server answered {error.code} {error.reason}") from error
    except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
        raise UserError(f"{url}: cannot be downloaded ({getattr(error, 'reason', error)})") from error
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


def _index(path: Path, shard: int) -> tuple[list[_Group], list[tuple[str, str]]]:
    """Samples of a shard in their order, and (name, reason) of what is left out."""
    listing = scan(path)
    groups: list[_Group] = []
    left_out = list(listing.left_out)
    for number, (key, first, end) in enumerate(zip(listing.keys, listing.starts, listing.starts[1:], strict=False)):
        members = {
            listing.suffixes[place]: _Member(shard, listing.offsets[place], listing.sizes[place])
            for place in range(first, end)
        }
        images = [suffix for suffix in members if suffix in _IMAGES]
        if len(images) > 1:
            left_out.append((key, f"several images ({', '.join(images)})"))
            continue
        image = members[images[0]] if images else None
        groups.append(_Group(key, image, members.get("txt"), members.get("json"), number in listing.again))
    return groups, left_out


def _text(data: bytes, id: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadItem(id, f"caption is not UTF-8 (byte {error.start})") from error


def _object(data: bytes, id: str) -> Mapping[str, Any]:
    try:
        fields = json.loads(data)
    except ValueError as error:
        raise BadItem(id, f"malformed .json ({error})") from error
    if not isinstance(fields, dict):
        raise BadItem(id, "malformed .json (not an object)")
    return fields


def _shard_names(shards: Sequence[Path]) -> list[str]:
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


def _cache_folder(cache: str | Path | None) -> Path:
    if cache is not None:
        return Path(cache).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "diptych" / "shards"


def _short_name(given: Sequence[str]) -> str:
    return os.path.basename(urllib.parse.urlsplit(given[0]).path) if given else "shards"
