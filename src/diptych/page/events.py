"""What a button does: a stream of values for the page's parts, whose first is a line of words, also when it fails."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Callable
from typing import Any

import gradio as gr

from diptych.page.shelf import in_words, note
from diptych.serving.errors import as_api_error

log = logging.getLogger(__name__)
Updates = AsyncGenerator[tuple[Any, ...]]
TICK = 1.0
"""Seconds after which an action that is silent gives an update of nothing: only then does Gradio notice a visitor who
has gone, and end the action."""


def spoken(action: Callable[..., Updates], parts: int) -> Callable[..., Updates]:
    """An action whose errors become its first value, in words, with its other values left as they are.

    Args:
        parts: how many values it gives.
    """

    async def said(*values: Any) -> Updates:
        nothing = (gr.skip(),) * parts
        updates, following = action(*values), None
        try:
            while True:
                following = following or asyncio.ensure_future(anext(updates, None))
                done, _ = await asyncio.wait({following}, timeout=TICK)
                if not done:
                    yield nothing
                    continue
                update, following = following.result(), None
                if update is None:
                    return
                yield update
        except Exception as error:
            if as_api_error(error, "").status == 500:
                log.error("the page failed: %s", type(error).__name__, exc_info=error)
            yield (note(in_words(error), error=True), *nothing[1:])
        finally:
            if following is not None:
                following.cancel()
                with contextlib.suppress(asyncio.CancelledError, Exception):
                    await following
            await updates.aclose()

    return said
