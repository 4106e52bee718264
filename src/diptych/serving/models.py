"""The models of a server: loaded when they are first asked for, as many as are to be kept, the rest by last use."""

from __future__ import annotations

import asyncio
import gc
import logging
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

from diptych.core.errors import nearest
from diptych.inference.engine import Engine
from diptych.recipes.load import load
from diptych.serving.adapters import MAX_ADAPTERS, Adapters, with_adapter
from diptych.serving.errors import ApiError, bad
from diptych.serving.memory import Costs, measured

log = logging.getLogger(__name__)


class Models:
    """Models by the names that requests call them.

    Args:
        names: as of `diptych.load`. keep: of those that are loaded at a time. device: of all. dropped: called with a
            model that is unloaded. adapters: those that requests may choose.
    """

    def __init__(
        self,
        names: Sequence[str],
        *,
        keep: int,
        device: str,
        dropped: Callable[[Engine], None],
        adapters: Adapters | None = None,
    ) -> None:
        self.names = list(dict.fromkeys(names))
        self.adapters = adapters or Adapters()
        self.keep = keep
        self.device = device
        self.created = int(time.time())
        self._dropped = dropped
        self._loaded: OrderedDict[str, Engine] = OrderedDict()
        self._adapted: dict[str, Engine] = {}
        self._uses: dict[str, int] = {}
        self._costs: dict[str, Costs] = {}
        self._lock = asyncio.Lock()

    def listed(self) -> list[str]:
        """All that a request may name: each model, and it with each of its adapters."""
        return [
            name for model in self.names for name in (model, *(f"{model}:{each}" for each in self.adapters.of(model)))
        ]

    def check(self, name: str) -> str:
        """The name; 404 with the nearest for one that is not served."""
        names = self.listed()
        if name not in names:
            guess = nearest(name, names)
            hint = f" Did you mean {guess!r}?" if guess else ""
            message = f"the model {name!r} is not served here.{hint} Served: {', '.join(names)}."
            raise ApiError(404, message, param="model", code="model_not_found")
        return name

    def parts(self, name: str) -> tuple[str, str]:
        """The model of a name, and its adapter, "" for none."""
        model, _, adapter = (name, "", "") if name in self.names else name.rpartition(":")
        return model, adapter

    async def add_adapter(self, model: str, name: str) -> str:
        """Load an adapter from the folder for a model; the name by which requests choose both.

        Raises:
            ApiError: no such adapter or model, too many of them, or another adapter of this name. UserError: one that
                does not fit the model.
        """
        if model not in self.names:
            self.check(model)
            raise bad("model", f"{model!r} is a model with an adapter; name the model alone")
        path = str(await asyncio.to_thread(self.adapters.place, name))
        known = self.adapters.of(model).get(name)
        if known not in (None, path):
            raise bad("name", f"{model} has another adapter {name!r} already")
        if known is None:
            if self.adapters.count() >= MAX_ADAPTERS:
                raise bad("name", f"there are {MAX_ADAPTERS} adapters already")
            async with self.use(model) as engine:
                made = await asyncio.to_thread(with_adapter, engine, name, path)
            self.adapters.known.setdefault(model, {})[name] = path
            self._adapted.setdefault(f"{model}:{name}", made)
        return f"{model}:{name}"

    @asynccontextmanager
    async def use(self, name: str) -> AsyncIterator[Engine]:
        """A model, with its adapter where the name has one; it stays loaded while it is used."""
        self.check(name)
        model, adapter = self.parts(name)
        async with self._lock:
            engine = self._loaded.get(model)
            if engine is None:
                await self._make_room()
                engine = await asyncio.to_thread(self._load, model)
                self._loaded[model] = engine
            self._loaded.move_to_end(model)
            self._uses[model] = self._uses.get(model, 0) + 1
            try:
                if adapter and name not in self._adapted:
                    path = self.adapters.of(model)[adapter]
                    self._adapted[name] = await asyncio.to_thread(with_adapter, engine, adapter, path)
                chosen = self._adapted[name] if adapter else engine
            except BaseException:
                self._uses[model] -= 1
                raise
        try:
            yield chosen
        finally:
            self._uses[model] -= 1

    def loaded_engine(self, name: str) -> Engine | None:
        """A model that is loaded, without a use of it; None for one that is not."""
        return self._loaded.get(self.parts(name)[0])

    def costs(self, name: str) -> Costs:
        """What requests of a model that was loaded take in memory."""
        return self._costs[self.parts(name)[0]]

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
                for name in [name for name in self._adapted if self.parts(name)[0] == idle[0]]:
                    self._dropped(self._adapted.pop(name))
                log.info("unloaded %s", idle[0])
                del engine
                gc.collect()
                continue
            await asyncio.sleep(0.02)

    def _load(self, name: str) -> Engine:
        begun = time.monotonic()
        engine = load(name, device=self.device)
        log.info("loaded %s in %.1f s", name, time.monotonic() - begun)
        if name not in self._costs:
            self._costs[name] = measured(engine)
        return engine
