"""Checkpoints written beside training: every process its own part, complete or not to be found.

    copy to host memory | a thread: files, read back, synced | all are done: the main process renames the folder

Training goes on after the copy. What a killed process leaves is a hidden folder without its name.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from diptych.checkpoints.chunks import Place, offsets_metadata
from diptych.checkpoints.tensors import checksum, read_tensors, weight_files, write_tensors
from diptych.core.errors import UserError
from diptych.core.files import begin_folder, commit_folder, remove_folder, remove_litter, sync
from diptych.training import state
from diptych.training.host_group import gather
from diptych.training.tensors import local

log = logging.getLogger(__name__)

Group = list[tuple[str, Tensor, Place]]
"""Tensors, or the parts of them that a process writes, by name, and where they begin in the whole."""


class Saver:
    """Writes the checkpoints of a run into `folder` and keeps the last `keep`, with `keep_stages` the last one of each
    stage too.

    `start`, `advance` and `finish` are called by all processes together.

    Args:
        rank, world: this process and how many share the writing.
    """

    def __init__(self, folder: Path, *, keep: int, keep_stages: bool = False, rank: int = 0, world: int = 1) -> None:
        self.folder, self.keep, self.keep_stages = folder, keep, keep_stages
        self.rank, self.world = rank, world
        self._thread: threading.Thread | None = None
        self._final = self._temporary = folder
        self._error = ""

    def start(
        self, progress: state.Progress, train_state: state.TrainState, recipe: dict[str, Any], *, check: bool = False
    ) -> None:
        """Begin to write a checkpoint of this moment; what is copied here, training may change afterwards.

        Where host memory has no room for a copy, it is written at once instead.

        Args:
            check: read back what was written and compare.

        Raises:
            UserError: the one before it, or this one, could not be written, or reads back differently.
        """
        self.finish()
        self._final = self.folder / f"{state.PREFIX}{progress.total:08d}"
        progress.ema_steps = train_state.ema.steps if train_state.ema else 0
        groups = {kind: self._own(tensors) for kind, tensors in state.groups(train_state).items()}
        # 1. One process makes the folder; all know what it will hold.
        temporary = begin_folder(self._final) if self.rank == 0 else None
        shards = (temporary, {kind: len(tensors) for kind, tensors in groups.items()})
        everyone = gather(shards) if self.world > 1 else [shards]
        self._temporary = next(path for path, _ in everyone if path is not None)
        progress.tensors = {kind: sum(counts[kind] for _, counts in everyone) for kind in groups}
        progress.processes = self.world
        texts = {"recipe.json": json.dumps(recipe, indent=1), "progress.json": json.dumps(asdict(progress))}
        # 2. A copy in host memory, where there is room.
        size = sum(tensor.nbytes for tensors in groups.values() for _, tensor, _ in tensors)
        room = 1.2 * size < psutil.virtual_memory().available
        if room:
            groups = {kind: copied(tensors) for kind, tensors in groups.items()}
        # 3. The files.
        work = threading.Thread(target=self._write, args=(groups, texts, check), name="checkpoint", daemon=True)
        self._thread = work
        work.start()
        if not room:
            log.info("no room in host memory for a copy of %.1f GB: the checkpoint is written at once", size / 1e9)
            work.join()

    def status(self) -> str:
        """For the other processes: "idle", "writing", "done", or what went wrong."""
        if self._thread is None:
            return "idle"
        return "writing" if self._thread.is_alive() else self._error or "done"

    def advance(self, statuses: Sequence[str]) -> None:
        """Give the checkpoint its name once all processes are done with it.

        Args:
            statuses: of all processes, the same on each.

        Raises:
            UserError: it could not be written; the checkpoints before it are untouched.
        """
        if self._thread is None or "writing" in statuses:
            return
        self._thread = None
        bad = [status for status in statuses if status != "done"]
        if bad:
            if self.rank == 0:
                remove_folder(self._temporary)
            raise UserError(bad[0])
        if self.rank == 0:
            commit_folder(self._temporary, self._final)
            self.remove_old()

    def finish(self) -> None:
        """Wait until the checkpoint that is being written is complete; errors as of `advance`."""
        if self._thread is not None:
            self._thread.join()
            self.advance(gather(self.status()) if self.world > 1 else [self.status()])

    def _own(self, tensors: Iterable[tuple[str, Tensor]]) -> Group:
        """What this process writes: its part of sharded tensors, and of the others every world-th."""
        mine: Group = []
        for number, (name, tensor) in enumerate(tensors):
            if isinstance(tensor, DTensor):
                mesh, placements = tensor.device_mesh, tensor.placements
                shape, offset = compute_local_shape_and_global_offset(tensor.shape, mesh, placements)
                place = mesh.get_coordinate() or []
                first = all(at == 0 for at, kind in zip(place, placements, strict=True) if isinstance(kind, Replicate))
                if first and all(shape):
                    mine.append((name, local(tensor.detach()), tuple(offset)))
            elif number % self.world == self.rank:
                mine.append((name, tensor.detach(), (0,) * tensor.ndim))
        return mine

    def _write(self, groups: dict[str, Group], texts: dict[str, str], check: bool) -> None:
        try:
            for kind, tensors in groups.items():
                offsets = {name: offset for name, _, offset in tensors}
                stem = state.stem_of(kind, self.rank, self.world)
                metadata = self._metadata(offsets) if self.world > 1 else None
                write_tensors(self._temporary, ((n, x) for n, x, _ in tensors), stem, metadata=metadata)
                if check and kind == "trained":
                    read_back(self._temporary, stem, tensors)
                for path in self._temporary.glob(f"{stem}*"):
                    sync(path)  # the folder and the small files follow when all are done
            for name, text in texts.items() if self.rank == 0 else ():
                (self._temporary / name).write_text(text, encoding="utf-8")
        except UserError as error:
            self._error = str(error).replace(str(self._temporary), str(self._final))
        except Exception as error:
            reason = getattr(error, "strerror", None) or error
            self._error = f"{self._final}: could not be written ({reason}); nothing was changed"

    @staticmethod
    def _metadata(offsets: dict[str, Place]) -> Callable[[Iterable[str]], dict[str, str]]:
        return lambda names: offsets_metadata({name: offsets[name] for name in names})

    def remove_old(self) -> None:
        """Remove checkpoints beyond those that are kept, and litter; after a power cut removed ones may be back."""
        there = state.checkpoints(self.folder)
        last_of_stage: dict[int, Path] = {}
        for path in there if self.keep_stages else ():
            with suppress(UserError):  # a damaged one is nobody's last
                last_of_stage[state.read_progress(path).stage] = path
        for old in there[: -self.keep]:
            if old not in last_of_stage.values():
                remove_folder(old)
        remove_litter(self.folder)


def copied(tensors: Group) -> Group:
    """The same tensors in host memory of their own; copies from a device run beside each other."""
    made = [(name, _to_host(tensor), offset) for name, tensor, offset in tensors]
    if any(tensor.device.type == "cuda" for _, tensor, _ in tensors):
        torch.cuda.synchronize()
    return made


def _to_host(tensor: Tensor) -> Tensor:
    if tensor.device.type != "cuda":
        return tensor.detach().to("cpu", copy=True)
    return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)


def read_back(folder: Path, stem: str, tensors: Group) -> None:
    """UserError when a written tensor is not the one in memory, byte by byte."""
    back: Iterator[tuple[str, Tensor]] = read_tensors(weight_files(folder, stem))
    sums = {name: checksum(tensor) for name, tensor in back}
    for name, tensor, _ in tensors:
        if sums[name] != checksum(tensor):
            raise UserError(f"{folder}: {name} reads back differently from what was written; is the disk sound?")
