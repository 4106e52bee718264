"""WebDataset tar shards, read at random through an index of their members."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from diptych.core.errors import UserError, unknown
from diptych.core.reading import reason as in_words
from diptych.core.sample import Sample, Task
from diptych.data.caption_file import CaptionFile, Joined, join
from diptych.data.captions import TextKeys, TextSetting, lookup, text_keys
from diptych.data.columns import derived, digest
from diptych.data.imaging import FitMode, check_fit
from diptych.data.left_out import LeftOut
from diptych.data.loss_masks import MEMBER
from diptych.data.open_shards import ChangedShard, Member, OpenShards
from diptych.data.reading import Reading
from diptych.data.rows import KEYS, MASK, Row, keys_of, make_sample, parse_row, usable_text
from diptych.data.shards import cache_folder, local_shards, shard_names, short_name
from diptych.data.source import BadItem, ItemDraws, Listed, Scored, Size, Source, check_task, describe, file_stamp
from diptych.data.tar_index import tar_index
from diptych.data.tar_scan import IMAGE_SUFFIXES

_TASKS: tuple[Task, ...] = ("image", "text_to_image", "edit", "understand")
_APART = "members of its name stand elsewhere in the shard; those of one sample must follow each other"
_REASONS = ("", "no image", "several images", "no caption", "no .json", "no source image", "")
_NO_IMAGE, _SEVERAL, _NO_CAPTION, _NO_JSON, _NO_SOURCE, _NOT_JOINED = range(1, 7)
_REPEATED = re.compile(r"#\d+$")
_BLOCK = 1 << 20


class WebDatasetSource(Source, Scored, Listed):
    """Samples of tar shards: members that follow each other and share a name up to its first dot are one sample
    (`tar_scan`).

    - `image`: an image
    - `text_to_image`: an image and a .txt, or a .json with "text" or "caption"
    - `edit`: an image, a source image and an instruction, as `columns` names them
    - `understand`: a .json with "conversations" or "messages", and an image where they hold `<image>`

    Where the members lie is read once, into an index that all processes map (`tar_index`). Shards at a URL are
    downloaded whole, once, into `cache`. A sample without what its task needs is dropped and counted.

    Args:
        shards: path, glob, http(s) URL, or several; `{000..012}` and `{a,b}` expand.
        fit: `crop` or `letterbox`.
        reading: how images are read (`reading.Reading`).
        text: where captions stand: suffixes of members or keys of the .json, one, several or with weights
            (`captions.TextKeys`).
        captions: a second file that holds the captions, by the samples' keys.
        columns: the member (by its suffix) or key of the .json that stands for one of ours, as in {image: edited.png,
            source: input.png, instruction: txt}.
        cache: folder for downloads; ~/.cache/diptych/shards by default.

    Raises:
        UserError: no shard found; a shard is no tar, truncated or compressed (`tar_scan.scan`); a download fails; the
            index cannot be written; or nothing is usable.
    """

    def __init__(
        self,
        shards: str | Path | Sequence[str | Path],
        *,
        task: str = "text_to_image",
        fit: str = "crop",
        reading: Reading | None = None,
        text: TextSetting | None = None,
        captions: CaptionFile | None = None,
        columns: Mapping[str, str] | None = None,
        cache: str | Path | None = None,
        name: str | None = None,
    ) -> None:
        given = [str(shards)] if isinstance(shards, str | Path) else [str(shard) for shard in shards]
        self.name = name or short_name(given)
        self.task = check_task(task, _TASKS, self.name)
        self.fit: FitMode = check_fit(fit, self.name)
        self.reading = reading or Reading()
        self.columns = _checked(columns or {}, self.task, self.name, keys_of(self.task, self.reading))
        asked = self.columns.get("text", text)
        self.text = None if asked is None else text_keys(asked, self.name)
        self.shards = [path for shard in given for path in local_shards(shard, cache_folder(cache))]
        if not self.shards:
            raise UserError(f"{self.name}: no shards given")
        self._names = shard_names(self.shards)
        self._index = tar_index(self.shards, given)
        self._files = OpenShards(self._index.meta["shards"])
        self._suffixes: list[str] = self._index.meta["suffixes"]
        self._identity = digest(self._index.meta["shards"], self.task, self.columns, repr(self.text))
        self._joined: Joined | None = None
        if captions is not None:
            if self.task != "text_to_image" or self.text is not None:
                raise UserError(f"{self.name}: captions of a file go with task text_to_image, and without `text`")
            self._joined = join(captions, digest(self._index.meta["shards"]), self._names_of_samples, self.name)
            self._identity = digest(self._identity, repr(captions), file_stamp(self._joined.file))
        self._chosen = derived("chosen", self._identity, self._choose)
        lost = len(self._chosen["lost"]) + len(self._index.meta["left_out"])
        others = self._joined is not None and self._joined.unmatched > 0
        dropped = LeftOut(self._left_out, lost + others)
        self.dropped: Mapping[str, str] = dropped
        if not len(self):
            first = f" (first: {next(self._left_out())})" if dropped else ""
            raise UserError(f"{self.name}: no usable sample for task {self.task!r} in {len(self.shards)} shards{first}")

    def __len__(self) -> int:
        return len(self._chosen["rows"])

    def load(self, index: int, draws: ItemDraws, size: Size) -> Sample:
        row = int(self._chosen["rows"][index])
        id, members = self._id(row), self._members(row)
        return make_sample(
            self._row(row, members, id),
            id=id,
            task=self.task,
            find=self._files.read,
            reading=self.reading,
            draws=draws,
            size=size,
            fit_mode=self.fit,
        )

    def sizes(self) -> np.ndarray | None:
        return None if self.task == "understand" else self._chosen["sizes"]

    def identity(self) -> str:
        return self._identity

    def fingerprint(self, index: int) -> str:
        row = int(self._chosen["rows"][index])
        member = self._image(self._members(row))
        if member is None:
            return f"{self._id(row)}:no image"
        shard, offset, length = member
        path, size, time = self._index.meta["shards"][shard]
        return f"{path}:{size}:{time}:{offset}:{length}:{self.fit}"

    def describe(self) -> str:
        return describe(self)

    def column(self, index: int, name: str) -> object:
        row = int(self._chosen["rows"][index])
        member = self._members(row).get("json")
        return None if member is None else lookup(_object(self._files.read(member), self._id(row)), name)

    def _members(self, row: int) -> dict[str, Member]:
        """Members of a sample by suffix, in their order."""
        index = self._index
        first, end = index["first"][row : row + 2].tolist()
        shard = int(np.searchsorted(index["shard_first"], row, side="right")) - 1
        places = slice(first, end)
        return {
            self._suffixes[suffix]: (shard, offset, length)
            for suffix, offset, length in zip(
                index["suffix"][places].tolist(),
                index["offset"][places].tolist(),
                index["length"][places].tolist(),
                strict=True,
            )
        }

    def _id(self, row: int) -> str:
        index = self._index
        shard = int(np.searchsorted(index["shard_first"], row, side="right")) - 1
        return self._named(shard, self._key(row))

    def _key(self, row: int) -> str:
        ends = self._index["key_end"]
        start = int(ends[row - 1]) if row else 0
        return self._index["keys"][start : int(ends[row])].tobytes().decode()

    def _named(self, shard: int, key: str) -> str:
        return f"{self.name}/{self._names[shard]}/{key}"

    def _image(self, members: Mapping[str, Member]) -> Member | None:
        if "image" in self.columns:
            return members.get(self.columns["image"])
        return next((member for suffix, member in members.items() if suffix in IMAGE_SUFFIXES), None)

    def _row(self, row: int, members: Mapping[str, Member], id: str) -> Row:
        """What the task reads of a sample; BadItem where it is not there or malformed."""
        image = self._image(members)
        mask = members.get(self.columns.get(MASK, MEMBER))
        if self.task == "image":
            return Row(target=image, mask=mask)
        try:
            if self.task == "text_to_image":
                texts, weights = self._texts(members, id) if self._joined is None else self._joined.texts(row)
                return Row(target=image, mask=mask, texts=texts, weights=weights)
            if self.task == "edit":
                names = TextKeys((self.columns.get("instruction", "instruction"),), (1.0,), preferred=False)
                texts, weights = names.texts(self._record(members, names.names, id), id)
                source = members[self.columns["source"]]
                return Row(target=image, mask=mask, context=(source,), texts=texts, weights=weights)
            fields = _object(self._files.read(members["json"]), id)
            turns = {key: value for key in KEYS["understand"] if (value := self._field(fields, key)) is not None}
            return parse_row({**turns, "images": [image] if image else []}, self.task, id, (tuple,))
        except ChangedShard:
            raise
        except UserError as error:
            raise BadItem(id, str(error).removeprefix(f"{id}: ")) from error

    def _field(self, fields: Mapping[str, Any], key: str) -> Any:
        return lookup(fields, self.columns.get(key, key)) if key in ("conversations", "messages") else None

    def _texts(self, members: Mapping[str, Member], id: str) -> tuple[tuple[str, ...], tuple[float, ...]]:
        if self.text is not None:
            return self.text.texts(self._record(members, self.text.names, id), id)
        if "txt" in members:
            return (usable_text(_text(self._files.read(members["txt"]), id), id),), ()
        return TextKeys().texts(_object(self._files.read(members["json"]), id), id)

    def _record(self, members: Mapping[str, Member], names: Sequence[str], id: str) -> dict[str, Any]:
        """Texts of members by suffix, on what the .json holds."""
        record = dict(_object(self._files.read(members["json"]), id)) if "json" in members else {}
        return {**record, **{name: _text(self._files.read(members[name]), id) for name in names if name in members}}

    def _choose(self) -> dict[str, np.ndarray]:
        """From the index alone: `rows`, samples that can serve the task; `sizes`, (height, width) of their images, 0
        where unreadable; `lost`, the other samples; `why`, a number of `_REASONS` for each."""
        count = len(self._index["again"])
        wide = np.uint32 if count < 2**32 else np.uint64
        rows: list[np.ndarray] = [np.zeros(0, wide)]
        sizes: list[np.ndarray] = [np.zeros((0, 2), np.uint16)]
        lost: list[np.ndarray] = [np.zeros(0, wide)]
        why: list[np.ndarray] = [np.zeros(0, np.uint8)]
        for start in range(0, count, _BLOCK):
            reason, size = self._judge(start, min(start + _BLOCK, count))
            usable = reason == 0
            rows.append((np.flatnonzero(usable) + start).astype(wide))
            sizes.append(size[usable])
            lost.append((np.flatnonzero(~usable) + start).astype(wide))
            why.append(reason[~usable])
        joined = {"rows": rows, "sizes": sizes, "lost": lost, "why": why}
        return {name: np.concatenate(pieces) for name, pieces in joined.items()}

    def _judge(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Why each of some samples cannot serve the task (0: it can), and the size of its image."""
        first = self._index["first"][start : stop + 1].astype(np.int64)
        members = slice(int(first[0]), int(first[-1]))
        suffix = self._index["suffix"][members]
        sample = np.repeat(np.arange(stop - start), np.diff(first))

        def has(suffixes: Collection[str]) -> tuple[np.ndarray, np.ndarray]:
            """How many members of each sample have one of these suffixes, and where the last of them is."""
            wanted = [number for number, name in enumerate(self._suffixes) if name in suffixes]
            places = np.flatnonzero(np.isin(suffix, wanted))
            where = np.zeros(stop - start, np.int64)
            where[sample[places]] = places
            return np.bincount(sample[places], minlength=stop - start), where

        # Its image, and the sides of that.
        images = frozenset((self.columns["image"],)) if "image" in self.columns else IMAGE_SUFFIXES
        number, place = has(images)
        sides = np.stack([self._index["height"][members][place], self._index["width"][members][place]], axis=1)
        sides[number == 0] = 0
        # The first thing that it lacks.
        reason = np.zeros(stop - start, np.uint8)
        described = has(("json",))[0] > 0
        if self.task == "understand":
            reason[~described] = _NO_JSON
        else:
            reason[number == 0] = _NO_IMAGE
        reason[number > 1] = _SEVERAL
        if self.task == "edit":
            reason[(reason == 0) & (has((self.columns["source"],))[0] == 0)] = _NO_SOURCE
        if self._joined is not None:
            reason[(reason == 0) & ~self._joined.matched[start:stop]] = _NOT_JOINED
        elif self.task in ("edit", "text_to_image"):
            written = has(self._text_names())[0] > 0
            reason[(reason == 0) & ~(described | written)] = _NO_CAPTION
        return reason, sides

    def _text_names(self) -> tuple[str, ...]:
        if self.task == "edit":
            return (self.columns.get("instruction", "instruction"),)
        return ("txt",) if self.text is None else self.text.names

    def _left_out(self) -> Iterator[tuple[str, str]]:
        for shard, name, reason in self._index.meta["left_out"]:
            yield self._named(shard, name), reason
        again = self._index["again"]
        for row, code in zip(self._chosen["lost"].tolist(), self._chosen["why"].tolist(), strict=True):
            reason = _REASONS[code]
            if code == _SEVERAL:
                reason += f" ({', '.join(suffix for suffix in self._members(row) if suffix in IMAGE_SUFFIXES)})"
            if code == _NOT_JOINED:
                assert self._joined is not None
                reason = self._joined.lacks(row)
            yield (
                self._id(row),
                f"{reason}; {_APART}" if again[row] and code < _NO_JSON and code != _SEVERAL else reason,
            )
        if self._joined is not None and self._joined.unmatched:
            count, first = self._joined.unmatched, self._joined.first
            yield f"{self.name}/{self._joined.file.name}", f"captions of other keys ({count:,}, the first is {first!r})"

    def _names_of_samples(self) -> Iterator[tuple[str, ...]]:
        """What a caption's key may call each sample of the index."""
        keys, ends = self._index["keys"], self._index["key_end"]
        shards = self._index["shard_first"].tolist()
        for shard, (first, stop) in enumerate(itertools.pairwise(shards)):
            stem = self._names[shard].removesuffix(".tar")
            start = int(ends[first - 1]) if first else 0
            for end, again in zip(ends[first:stop].tolist(), self._index["again"][first:stop].tolist(), strict=True):
                key = keys[start:end].tobytes().decode()
                start = end
                if again:
                    key = _REPEATED.sub("", key)  # it may be either
                yield f"{stem}/{key}", key, key.rpartition("/")[2]


def _checked(columns: Mapping[str, str], task: Task, where: str, keys: Sequence[str]) -> dict[str, str]:
    """`columns` by the keys that the task reads, suffixes without their dot."""
    for key in columns:
        if key not in keys or key in ("sources", "images"):
            known = [key for key in keys if key not in ("sources", "images")]
            raise unknown("column key", key, known, where)
    if task == "edit" and "source" not in columns:
        raise UserError(f"{where}: edits in tar files need `columns`, such as {{image: edited.png, source: input.png}}")
    members = ("image", "source", MASK)
    return {key: value.lower().removeprefix(".") if key in members else value for key, value in columns.items()}


def _text(data: bytes, id: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadItem(id, f"caption is not UTF-8 (byte {error.start})") from error


def _object(data: bytes, id: str) -> Mapping[str, Any]:
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BadItem(id, f"malformed .json ({in_words(error)})") from error
    if not isinstance(fields, dict):
        raise BadItem(id, "malformed .json (not an object)")
    return fields
