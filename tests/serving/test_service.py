"""Jobs are dropped when nobody reads their events any more."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

from diptych.serving.jobs import Event
from diptych.serving.service import Service


def test_a_reader_who_leaves_just_when_an_event_comes_drops_the_job() -> None:
    """The cancellation and the event arrive in one turn of the loop, where Python 3.11's wait_for loses the former."""
    dropped: list[bool] = []
    seen: list[Event] = []
    job: Any = SimpleNamespace(cancel=lambda: dropped.append(True))
    scheduler: Any = SimpleNamespace(submit=lambda job: None)
    unused: Any = None
    options: Any = SimpleNamespace(timeout=60.0)
    service = Service(models=unused, scheduler=scheduler, metrics=unused, options=options, cache=unused)

    async def leave() -> None:
        tells: list[Any] = []

        def make(tell: Any) -> Any:
            tells.append(tell)
            return job

        async def read() -> None:
            async for event in service.run(make, "prompt"):
                seen.append(event)

        reader = asyncio.ensure_future(read())
        for _ in range(5):
            await asyncio.sleep(0)
        tells[0](Event(kind="started"))
        asyncio.get_running_loop().call_soon(reader.cancel)
        await asyncio.wait({reader}, timeout=10)
        assert reader.cancelled()

    asyncio.run(leave())
    assert dropped == [True]
    assert seen == []
