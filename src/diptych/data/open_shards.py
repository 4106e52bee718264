"""Members of tar shards, read at their places; some shards stay open."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diptych.core.errors import UserError
from diptych.data.stores import Remote, remote_of

_OPEN_SHARDS = 64

Member = tuple[int, int, int]
"""A member's shard, the offset of its bytes, and their number."""


class ChangedShard(UserError):
    """A shard is not what was indexed, or cannot be read; no sample of it can be trusted."""


class OpenShards:
    """Reads from shards, of which some stay open; each process opens its own."""

    def __init__(self, stamps: Sequence[Sequence[Any]]) -> None:
        self.stamps = stamps
        self._open: dict[int, int | Remote] = {}
        self._opening = threading.Lock()

    def read(self, member: Member) -> bytes:
        """ChangedShard where the shard is not the one that was indexed."""
        shard, offset, length = member
        opened = self._open.get(shard) or self._opened(shard)
        if not isinstance(opened, Remote):
            data = os.pread(opened, length, offset)
            self._check(shard, opened)  # it may have been written over in its place
            return data
        try:
            return opened.read(offset, length)
        except UserError as error:  # of the store, not of the sample
            raise ChangedShard(str(error)) from error

    def _opened(self, shard: int) -> int | Remote:
        """A descriptor, or what is in the store where the copy had to make room."""
        with self._opening:  # threads of one process share what is open
            return self._open.get(shard) or self._open_anew(shard)

    def _open_anew(self, shard: int) -> int | Remote:
        path, size, time = self.stamps[shard]
        if len(self._open) >= _OPEN_SHARDS:
            oldest = self._open.pop(next(iter(self._open)))
            if isinstance(oldest, int):
                os.close(oldest)
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            remote = remote_of(Path(path))
            if remote is not None and (remote.size, remote.time) == (size, time):
                self._open[shard] = remote
                return remote
            raise ChangedShard(f"{path}: the shard cannot be opened any more ({error.strerror})") from error
        self._open[shard] = descriptor
        self._check(shard, descriptor)
        return descriptor

    def _check(self, shard: int, descriptor: int) -> None:
        path, size, time = self.stamps[shard]
        there = os.fstat(descriptor)
        if (there.st_size, there.st_mtime_ns) != (size, time):
            raise ChangedShard(f"{path}: the shard has changed since it was indexed; start again to index it anew")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}, "_opening": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _opening=threading.Lock())

    def __del__(self) -> None:
        for opened in self._open.values():
            if isinstance(opened, int):
                os.close(opened)
