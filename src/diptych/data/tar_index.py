"""An index of tar shards: where every member of every sample lies and how large its image is, made once and mapped.

Columns, of which a pair of image and caption takes some 60 bytes:

- by sample: `first`, its first member (one more at the end); `again`, whether its key comes elsewhere in the shard;
  `key_end`, where its key ends in `keys`
- by member: `offset` and `length` in the shard; `suffix`, its number among `meta["suffixes"]`; `height` and `width`
- by shard: `shard_first`, its first sample (one more at the end)
"""

from __future__ import annotations

import abc
import itertools
import json
import logging
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import numpy as np

from diptych.core import environment
from diptych.core.errors import UserError
from diptych.core.files import write_file
from diptych.core.progress import progress_bar
from diptych.data.columns import Columns, digest, index_root, locked, store, stored, writing
from diptych.data.stores import remote_of
from diptych.data.tar_scan import Listing, scan

logger = logging.getLogger(__name__)

_PROCESSES = "DIPTYCH_INDEX_PROCESSES"
_SHARDS_A_PROCESS = 4
"""Fewer shards than this are not worth starting another process for."""
_QUIET_SECONDS = 2.0
_MOST_MEMBERS = 2**16 - 1
"""Of a sample, and endings of names in a shard."""


Stamp = tuple[str, int, int]
"""(absolute path, size in bytes, time of the last change in nanoseconds) of a shard."""


def stamp(path: Path) -> Stamp:
    """UserError where the shard is missing. Of a copy that made room it is what the copy was."""
    try:
        stat = path.stat()
    except OSError as error:
        remote = remote_of(path)
        if remote is not None:
            return os.path.abspath(path), remote.size, remote.time
        raise UserError(f"{path}: not readable ({error.strerror or error})") from error
    return os.path.abspath(path), stat.st_size, stat.st_mtime_ns


def tar_index(shards: Sequence[Path], given: Sequence[str]) -> Columns:
    """The index of these shards: mapped when there is one that is up to date, else made.

    Shards that have changed since, or are new, are scanned; the others' part of an earlier index is taken over. Scanned
    shards are kept at once, so that an indexing that was stopped goes on where it was.

    Args:
        given: what the user named them by; indexes of the same words replace each other.

    Raises:
        UserError: as `scan`; or the index cannot be written.
    """
    stamps = [stamp(path) for path in shards]
    base = index_root() / "shards" / digest([os.path.abspath(text) for text in given])[:16]
    folder = base / digest(stamps)
    if (index := stored(folder)) is not None:
        return index
    with locked(base):
        if (index := stored(folder)) is not None:
            return index
        earlier = [index for path in sorted(base.iterdir()) if path.name[0] != "." and (index := stored(path))]
        _report_changes(earlier, stamps)
        known = {tuple(shard): (index, place) for index in earlier for place, shard in enumerate(index.meta["shards"])}
        parts = base / ".parts"
        places = {shard: _place(shard, parts) for shard in stamps if shard not in known}
        _scan_all([(Path(shard[0]), part) for shard, part in places.items() if not _Part(part).whole()])
        pieces = [_Taken(*known[shard]) if shard in known else _Part(places[shard]) for shard in stamps]
        index = _merge(folder, stamps, pieces)
        shutil.rmtree(parts, ignore_errors=True)
        for path in base.iterdir():
            if path.name[0] != "." and path != folder:
                shutil.rmtree(path, ignore_errors=True)
        return index


def part_beside(path: Path) -> Path:
    """Where the part of a copied shard is kept that was indexed as soon as it came."""
    return path.with_name(f"{path.name}.index.npz")


def _place(shard: Stamp, parts: Path) -> Path:
    beside = part_beside(Path(shard[0]))
    return beside if beside.is_file() else parts / f"{digest(shard)}.npz"


def _report_changes(earlier: Sequence[Columns], stamps: Sequence[Stamp]) -> None:
    """Names the shards that an earlier index of the same words has otherwise."""
    if not earlier:
        return
    now = {path: (path, *rest) for path, *rest in stamps}
    before = {tuple(shard) for index in earlier for shard in index.meta["shards"]}
    paths = {shard[0] for shard in before}
    for what, names in (
        ("changed since they were indexed", [path for path in now if path in paths and now[path] not in before]),
        ("are not there any more", sorted(paths - set(now))),
        ("are new", [path for path in now if path not in paths]),
    ):
        if names:
            first = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
            logger.warning("%d shards %s: %s", len(names), what, first)


class _Piece(abc.ABC):
    """What an index holds of one shard, read when it is asked for."""

    @abc.abstractmethod
    def column(self, name: str) -> np.ndarray:
        """One of `again`, `count` (members of each sample), `key_length`, `keys`, and the columns by member."""

    @abc.abstractmethod
    def meta(self) -> dict[str, Any]:
        """`suffixes`, by their number in this part; `left_out`, (name, reason)."""


class _Part(_Piece):
    """A shard that was scanned: one file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def column(self, name: str) -> np.ndarray:
        with np.load(self.path, allow_pickle=False) as part:
            return part[name]

    def meta(self) -> dict[str, Any]:
        return json.loads(self.column("meta").tobytes())

    def whole(self) -> bool:
        """Whether the file is there and all of it can be read."""
        try:
            with np.load(self.path, allow_pickle=False) as part:
                return all(len(part[name]) >= 0 for name in part.files) and "meta" in part.files
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return False


class _Taken(_Piece):
    """A shard's part of an earlier index."""

    def __init__(self, index: Columns, shard: int) -> None:
        self.index, self.shard = index, shard

    def column(self, name: str) -> np.ndarray:
        index = self.index
        samples = slice(*index["shard_first"][self.shard : self.shard + 2].tolist())
        if name == "again":
            return index["again"][samples]
        if name in ("keys", "key_length"):
            ends = index["key_end"][samples].astype(np.int64)
            start = int(index["key_end"][samples.start - 1]) if samples.start else 0
            if name == "key_length":
                return np.diff(ends, prepend=start).astype(np.uint32)
            return index["keys"][start : int(ends[-1]) if len(ends) else start]
        first = index["first"][samples.start : samples.stop + 1].astype(np.int64)
        if name == "count":
            return np.diff(first).astype(np.uint16)
        return index[name][int(first[0]) : int(first[-1])]

    def meta(self) -> dict[str, Any]:
        left_out = [[name, reason] for place, name, reason in self.index.meta["left_out"] if place == self.shard]
        return {"suffixes": self.index.meta["suffixes"], "left_out": left_out}


def scan_to(path: Path, part: Path) -> None:
    """Scans a shard and stores its part; UserError as `scan`."""
    keep_part(scan(path), path, part)


def keep_part(listing: Listing, path: Path, part: Path) -> None:
    """Stores what a scan of a shard found.

    Raises:
        UserError: names with so many endings that they cannot be those of samples; or the part cannot be written.
    """
    suffixes = sorted(set(listing.suffixes))
    largest = max((b - a for a, b in itertools.pairwise(listing.starts)), default=0)
    if max(len(suffixes), largest) > _MOST_MEMBERS:
        raise UserError(
            f"{path}: its names have {len(suffixes):,} endings, and one sample {largest:,} members; a sample's name "
            "ends at its first dot (as in a.000001.jpg), so name the members otherwise and pack the shard again"
        )
    number = {suffix: place for place, suffix in enumerate(suffixes)}
    keys = [key.encode() for key in listing.keys]
    again = np.zeros(len(keys), np.uint8)
    again[list(listing.again)] = 1
    meta = json.dumps({"suffixes": suffixes, "left_out": listing.left_out}).encode()
    columns: dict[str, Any] = {
        "count": np.diff(np.array(listing.starts, np.int64)).astype(np.uint16),
        "again": again,
        "key_length": np.array([len(key) for key in keys], np.uint32),
        "keys": np.frombuffer(b"".join(keys), np.uint8),
        "offset": np.array(listing.offsets, np.uint64),
        "length": np.minimum(np.array(listing.sizes, np.uint64), 2**32 - 1).astype(np.uint32),
        "suffix": np.array([number[suffix] for suffix in listing.suffixes], np.uint16),
        "height": np.array(listing.heights, np.uint16),
        "width": np.array(listing.widths, np.uint16),
        "meta": np.frombuffer(meta, np.uint8),
    }
    with writing(part):
        write_file(part, lambda path: np.savez(path, **columns))


def _merge(folder: Path, stamps: Sequence[Stamp], pieces: Sequence[_Piece]) -> Columns:
    """One index of all pieces, each of which is read as its turn comes."""
    metas = [piece.meta() for piece in pieces]
    # Suffixes get one numbering over all pieces.
    suffixes = sorted({suffix for meta in metas for suffix in meta["suffixes"]})
    number = {suffix: place for place, suffix in enumerate(suffixes)}
    counts = [piece.column("count") for piece in pieces]
    wide = np.uint32 if sum(int(count.sum()) for count in counts) < 2**32 else np.uint64

    def running(columns: Iterable[np.ndarray], kind: Any) -> Iterator[np.ndarray]:
        """Sums so far, over all pieces."""
        total = 0
        for column in columns:
            sums = total + np.cumsum(column, dtype=np.int64)
            total = int(sums[-1]) if len(sums) else total
            yield sums.astype(kind)

    def pieced(name: str) -> Iterator[np.ndarray]:
        return (piece.column(name) for piece in pieces)

    def renumbered() -> Iterator[np.ndarray]:
        for piece, meta in zip(pieces, metas, strict=True):
            yield np.array([number[suffix] for suffix in meta["suffixes"]] or [0], np.uint16)[piece.column("suffix")]

    # Columns are streams, so that no more than a piece is in memory.
    columns: dict[str, Iterable[np.ndarray]] = {
        "first": itertools.chain([np.zeros(1, wide)], running(counts, wide)),
        "key_end": running(pieced("key_length"), np.uint64),
        "suffix": renumbered(),
        "shard_first": [np.cumsum([0, *map(len, counts)]).astype(np.uint64)],
        **{name: pieced(name) for name in ("keys", "again", "offset", "length", "height", "width")},
    }
    left_out = [[place, name, reason] for place, meta in enumerate(metas) for name, reason in meta["left_out"]]
    return store(folder, columns, {"shards": stamps, "suffixes": suffixes, "left_out": left_out})


def _scan_all(missing: Sequence[tuple[Path, Path]]) -> None:
    """Scans shards, in several processes where there are many."""
    if not missing:
        return
    wanted = environment.number(_PROCESSES, min(os.cpu_count() or 1, 16), minimum=1)
    processes = max(1, min(wanted, len(missing) // _SHARDS_A_PROCESS))
    with progress_bar("indexing", "shard", total=len(missing), delay=_QUIET_SECONDS) as bar:
        if processes == 1:
            for path, part in missing:
                scan_to(path, part)
                bar.update()
        else:
            _scan_in_processes(missing, processes, bar.update)


def _scan_in_processes(missing: Sequence[tuple[Path, Path]], processes: int, update: Callable[[], Any]) -> None:
    """Processes of their own, since threads would wait for each other and forks of a process with threads may hang."""
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-m", "diptych.data.tar_index"]
    with ExitStack() as stack:
        workers: list[subprocess.Popen[str]] = []
        for place in range(processes):
            worker = subprocess.Popen(command, env=variables, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            stack.callback(_end, worker)
            workers.append(worker)
            assert worker.stdin is not None
            worker.stdin.write("".join(json.dumps([str(a), str(b)]) + "\n" for a, b in missing[place::processes]))
            worker.stdin.close()
        for line in _lines([worker.stdout for worker in workers if worker.stdout is not None]):
            said = json.loads(line)
            if said is not None:
                raise UserError(said)
            update()
        for worker in workers:
            if worker.wait():
                raise UserError(f"an indexing process ended with code {worker.returncode}; start again, and it goes on")


def _lines(streams: Sequence[IO[str]]) -> Iterator[str]:
    """Lines of several streams as they come."""
    import selectors

    with selectors.DefaultSelector() as waiting:
        for stream in streams:
            waiting.register(stream, selectors.EVENT_READ)
        while waiting.get_map():
            for event, _ in waiting.select():
                line = event.fileobj.readline()  # type: ignore[union-attr]
                if line:
                    yield line
                else:
                    waiting.unregister(event.fileobj)


def _end(worker: subprocess.Popen[str]) -> None:
    if worker.poll() is None:
        worker.kill()
    worker.wait()
    if worker.stdout is not None:
        worker.stdout.close()


def work(tasks: IO[str], answers: IO[str]) -> None:
    """Scans the shards that lines of `tasks` name; answers a line for each: null, or what is wrong with it."""
    for line in list(tasks):
        path, part = json.loads(line)
        try:
            scan_to(Path(path), Path(part))
            answer = None
        except UserError as error:
            answer = str(error)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    work(sys.stdin, sys.stdout)
