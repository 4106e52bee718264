"""The models of a server: loaded when they are first asked for, as many as are to be kept, the rest by last use."""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import psutil
import torch

from diptych.core.errors import nearest
from diptych.inference.engine import Engine
from diptych.recipes.load import load
from diptych.serving.errors import ApiError

log = logging.getLogger(__name__)


class Models:
    """Models by the names that requests call them.

    Args:
        names: as of `diptych.load`. keep: of those that are loaded at a time. device: of all. dropped: called with a
            model that is unloaded.
    """

    def __init__(self, names: Sequence[str], *, keep: int, device: str, dropped: Callable[[Engine], None]) -> None:
        self.names = list(dict.fromkeys(names))
        self.keep = keep
        self.device = device
        self.created = int(time.time())
        self._dropped = dropped
        self._loaded: OrderedDict[str, Engine] = OrderedDict()
        self._uses: dict[str, int] = {}
        self._lock = asyncio.Lock()

    def check(self, name: str) -> str:
        """The name; 404 with the nearest for one that is not served."""
        if name not in self.names:
            guess = nearest(name, self.names)
            hint = f" Did you mean {guess!r}?" if guess else ""
            listed = ", ".join(self.names)
            message = f"the model {name!r} is not served here.{hint} Served: {listed}."
            raise ApiError(404, message, param="model", code="model_not_found")
        return name

    @asynccontextmanager
    async def use(self, name: str) -> AsyncIterator[Engine]:
        """A model, which stays loaded while it is used."""
        self.check(name)
        async with self._lock:
            engine = self._loaded.get(name)
            if engine is None:
                await self._make_room()
                engine = await asyncio.to_thread(self._load, name)
                self._loaded[name] = engine
            self._loaded.move_to_end(name)
            self._uses[name] = self._uses.get(name, 0) + 1
        try:
            yield engine
        finally:
            self._uses[name] -= 1

    def loaded_engine(self, name: str) -> Engine | None:
        """A model that is loaded, without a use of it; None for one that is not."""
        return self._loaded.get(name)

    def loaded(self) -> list[str]:
        """Names of the loaded ones, the least recently used first."""
        return list(self._loaded)

    async def _make_room(self) -> None:
        """Unload the least recently used one that no request uses; wait for one where all are used."""
        while len(self._loaded) >= self.keep:
            idle = [name for name in self._loaded if not self._uses.get(name)]
            if idle:
                engine = self._loaded.pop(idle[0])
                self._dropped(engine)
                log.info("unloaded %s", idle[0])
                del engine
                gc.collect()
                continue
            await asyncio.sleep(0.02)

    def _load(self, name: str) -> Engine:
        begun = time.monotonic()
        engine = load(name, device=self.device)
        log.info("loaded %s in %.1f s", name, time.monotonic() - begun)
        return engine


def measured_rows(engine: Engine, most: int) -> int:
    """How many images fit into half of the free memory at a time, at most `most`: one and four are made to measure."""
    if "text_to_image" not in engine.system.tasks:
        return most
    cuda = engine.system.device.type == "cuda"
    options: dict[str, Any] = {"steps": 2, "prompt_expansion": 0}

    def peak(n: int) -> int:
        if cuda:
            torch.cuda.reset_peak_memory_stats()
            engine.generate("a", n=n, **options)
            return torch.cuda.max_memory_allocated()
        with PeakMemory() as memory:
            engine.generate("a", n=n, **options)
        return memory.peak

    peak(1)  # what is made once is no part of an image
    each = max((peak(4) - peak(1)) // 3, 1 << 20)
    free = torch.cuda.mem_get_info()[0] if cuda else psutil.virtual_memory().available
    rows = max(1, min(most, int(free / 2 / each)))
    log.info("%s: %.0f MB for an image, %d at a time", engine.name, each / 1e6, rows)
    return rows


class PeakMemory:
    """The greatest resident memory of this process during a block."""

    def __enter__(self) -> PeakMemory:
        self.peak = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        process = psutil.Process()
        while not self._over.wait(0.002):
            self.peak = max(self.peak, process.memory_info().rss)
