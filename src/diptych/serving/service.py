"""What the API, the page and the tools share: a request's life from its model to its events."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from diptych.core.draws import key
from diptych.core.errors import UserError
from diptych.core.sample import Message, Sample
from diptych.core.tokens import NextToken, likeliest
from diptych.data.imaging import from_pil
from diptych.inference.caching import threshold_of
from diptych.inference.engine import Engine
from diptych.inference.provenance import facts
from diptych.inference.sampling import Sampling
from diptych.inference.scales import scale_names
from diptych.serving.cache import AnswerCache
from diptych.serving.errors import ApiError, bad
from diptych.serving.jobs import DrawingJob, Drawn, Event, Job, TextJob
from diptych.serving.metrics import Metrics
from diptych.serving.models import Models
from diptych.serving.pictures import keep_masked
from diptych.serving.scheduler import Scheduler
from diptych.systems.base import AssembledSystem

MOST_STEPS = 1000
MOST_EXPANSION = 32_768
"""Tokens of what a model may write before it draws."""
MOST_AREA = 16
"""Area of an image, in areas of the model's usual one."""
THOUGHT = 256
"""Tokens of a thought where a request asks for one and the model's settings say no number."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """timeout: seconds that a request may take. body: bytes of one. reading: seconds in which it must arrive.
    cache: bytes of answers that are kept, 0 for none. urls: hosts from which pictures may be fetched. key: that
    requests must bring. cors: origins of pages that may call. local: whether only this machine reaches the server.
    verbose: whether prompts are logged."""

    timeout: float = 600.0
    body: int = 64 << 20
    reading: float = 30.0
    cache: int = 64 << 20
    urls: tuple[str, ...] = ()
    key: str = ""
    cors: tuple[str, ...] = ()
    local: bool = False
    verbose: bool = False


@dataclass(frozen=True, kw_only=True)
class DrawCall:
    """Pictures that are asked for. options: of `Sampling`. mask: (H, W) what is kept of the first image, 0..1. noise:
    keys of the noise of each, in place of the seed. think: whether the model is to write before it draws. words: the
    field of the request that the prompt came from."""

    model: str
    prompt: str
    images: Sequence[Image.Image] = ()
    mask: np.ndarray | None = None
    n: int = 1
    seed: int | None = None
    noise: Sequence[int] | None = None
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    quality: str = "auto"
    think: bool | None = None
    scales: str = "last"
    partials: int = 0
    words: str = "prompt"


@dataclass(frozen=True, kw_only=True)
class WriteCall:
    """The next turn of a conversation that is asked for. pictures: of the `<image>` placeholders of all messages.
    choose: how tokens are chosen. stop: texts that end the answer. think: whether the model reasons first."""

    model: str
    messages: Sequence[Message]
    pictures: Sequence[Image.Image] = ()
    max_new_tokens: int = 256
    choose: NextToken = likeliest
    stop: Sequence[str] = ()
    think: bool = False


@dataclass(frozen=True, kw_only=True)
class Made:
    """Pictures of a call: at each scale, with what each carries; the seed of each, unless keys of noise were given."""

    images: list[list[Image.Image]]
    abouts: list[dict[str, str]]
    seeds: list[int]
    expansions: list[str]
    settings: Sampling
    drawn: Drawn
    prompt_tokens: int


@dataclass
class Service:
    """The parts of a running server."""

    models: Models
    scheduler: Scheduler
    metrics: Metrics
    options: Options
    cache: AnswerCache

    async def run(self, make: Callable[[Callable[[Event], None]], Job], words: str) -> AsyncGenerator[Event]:
        """Submit a job and give its events up to "done"; it is cancelled when the reader leaves, or in time.

        Args:
            words: the field of the request that the job's text came from.

        Raises:
            ApiError: it took too long. What it failed with, otherwise.
        """
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[Event] = asyncio.Queue()

        def tell(event: Event) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(events.put_nowait, event)

        job = make(tell)
        self.scheduler.submit(job)
        end = loop.time() + self.options.timeout
        try:
            while True:
                try:
                    # Not wait_for: in Python 3.11 it loses a cancellation that comes together with an event.
                    async with asyncio.timeout_at(end):
                        event = await events.get()
                except TimeoutError:
                    message = f"the request took longer than {self.options.timeout:g} s"
                    raise ApiError(504, message, code="timeout") from None
                if event.kind == "failed":
                    raise of_text(event.value, words)
                yield event
                if event.kind == "done":
                    return
        finally:
            job.cancel()

    async def draw(self, call: DrawCall) -> AsyncGenerator[Event]:
        """Pictures: "partial" events with masked estimates, and at last "done" with `Made`."""
        async with self.models.use(call.model) as engine:
            settings = settings_of(engine, call)
            task = "edit" if call.images else "text_to_image"
            if task not in engine.system.tasks:
                what = "cannot edit pictures" if call.images else "makes no pictures"
                raise bad("model", f"{call.model} {what}", "unsupported_task")
            check_size(engine, settings)
            check_scales(engine, call.scales)
            # Each picture has noise of its own seed, whatever it is batched with.
            seed = secrets.randbelow(1 << 31) if call.seed is None else call.seed
            seeds = [seed + place for place in range(call.n)]
            keys = list(call.noise) if call.noise is not None else [key(each, 0, 0) for each in seeds]
            context = ()
            if call.images:
                context = await asyncio.to_thread(lambda: tuple(from_pil(image) for image in call.images))
            sample = Sample(id="request", task=task, text=call.prompt, context_images=context)
            try:
                engine.image_size(sample, settings, "size" in call.options)
            except UserError as error:
                raise bad("image", str(error)) from error

            # A job for the scheduler; its events come while it draws.
            costs = self.models.costs(call.model)
            area = settings.size[0] * settings.size[1] / (engine.sampling.size[0] * engine.sampling.size[1])

            def make(tell: Callable[[Event], None]) -> Job:
                return DrawingJob(
                    engine=engine,
                    tell=tell,
                    cost=costs.drawing(settings, sample, call.n, area),
                    sample=sample,
                    keys=keys,
                    settings=settings,
                    scales=call.scales,
                    partials=call.partials,
                    sized="size" in call.options,
                    area=area,
                )

            def masked(image: Image.Image) -> Image.Image:
                return image if call.mask is None else keep_masked(image, call.images[0], call.mask)

            async with aclosing(self.run(make, call.words)) as events:
                async for event in events:
                    if event.kind == "partial":
                        yield Event(kind="partial", value=masked(event.value), image=event.image, index=event.index)
                    elif event.kind == "done":
                        drawn: Drawn = event.value
                        what = {"instruction": call.prompt} if call.images else {"prompt": call.prompt}
                        abouts = [facts(settings, model=call.model, seed=each, **what) for each in seeds]
                        if call.noise is not None:  # no seed stands for these pictures
                            abouts = [
                                {
                                    **{name: value for name, value in about.items() if name != "seed"},
                                    "noise": str(noise),
                                }
                                for about, noise in zip(abouts, keys, strict=True)
                            ]
                        for about, text in zip(abouts, drawn.expansions, strict=False):
                            about["expansion"] = text
                        made = Made(
                            images=[[masked(image) for image in row] for row in drawn.images],
                            abouts=abouts,
                            seeds=seeds if call.noise is None else [],
                            expansions=drawn.expansions,
                            settings=settings,
                            drawn=drawn,
                            prompt_tokens=count_words(engine, call.prompt),
                        )
                        yield Event(kind="done", value=made)
                    else:
                        yield event

    async def write(self, call: WriteCall) -> AsyncGenerator[Event]:
        """A text: "text" events with its pieces, and at last "done" with `Written`."""
        async with self.models.use(call.model) as engine:
            if "understand" not in engine.system.tasks:
                raise bad("model", f"{call.model} answers no questions", "unsupported_task")
            messages = call.messages
            if call.think:
                if not engine.system.reasons:
                    raise bad("think", f"{call.model} has no thinking mode for questions; leave it out")
                messages = engine.system.reasoning(messages)
            images = await asyncio.to_thread(lambda: [from_pil(picture) for picture in call.pictures])
            cost = self.models.costs(call.model).writing(len(images), call.max_new_tokens)

            def make(tell: Callable[[Event], None]) -> Job:
                return TextJob(
                    engine=engine, tell=tell, cost=cost, conversation=messages, images=images,
                    max_new_tokens=call.max_new_tokens, choose=call.choose, stop=call.stop,
                )  # fmt: skip

            async with aclosing(self.run(make, "messages")) as events:
                async for event in events:
                    yield event


async def last(events: AsyncIterator[Event]) -> Any:
    """The result that a job's events end with."""
    async for event in events:
        if event.kind == "done":
            return event.value
    raise AssertionError("a job ends with an event")


QUALITIES = {"auto": 1.0, "low": 0.5, "medium": 1.0, "standard": 1.0, "high": 2.0, "hd": 2.0}
"""Steps of a quality, in the model's own number."""
FIELDS = {
    "size": "size",
    "steps": "num_inference_steps",
    "cfg": "guidance_scale",
    "image_cfg": "image_guidance_scale",
    "negative": "negative_prompt",
}
"""What requests call a setting."""


def settings_of(engine: Engine, call: DrawCall) -> Sampling:
    """The settings of a call; an error names the field that is wrong."""
    settings = checked_settings(engine, call.options, edits=bool(call.images))
    changes: dict[str, Any] = {}
    if QUALITIES[call.quality] != 1:
        if "steps" in call.options:
            raise bad("quality", "it chooses the number of steps; leave out num_inference_steps, or quality")
        changes["steps"] = max(1, round(settings.steps * QUALITIES[call.quality]))
    steps = changes.get("steps", settings.steps)
    if steps > MOST_STEPS:
        raise bad("num_inference_steps", f"must be from 1 to {MOST_STEPS}, not {steps}")
    # Cached velocities are of a solver's own steps, which requests share here.
    if threshold_of(settings.cache) > 0:
        if "cache" in call.options:
            raise bad("sampling", "cache does not go with a server, where requests share steps; leave it out")
        changes["cache"] = "off"
    if call.think is not None:
        if call.think and not engine.system.expands:
            raise bad("think", f"{call.model} writes nothing before it draws; leave it out")
        changes["prompt_expansion"] = (settings.prompt_expansion or THOUGHT) if call.think else 0
    if changes.get("prompt_expansion", settings.prompt_expansion) > MOST_EXPANSION:
        raise bad("sampling", f"prompt_expansion must be from 0 to {MOST_EXPANSION}, not {settings.prompt_expansion}")
    return settings.over(changes) if changes else settings


def checked_settings(engine: Engine, options: Mapping[str, Any], *, edits: bool) -> Sampling:
    """The model's settings with these options, which are looked at one by one only where they do not fit."""
    try:
        return engine.settings(options, edits=edits)
    except UserError as error:
        for name, value in options.items():
            try:
                engine.settings({name: value}, edits=edits)
            except UserError as culprit:
                raise bad(FIELDS.get(name, "sampling"), str(culprit)) from culprit
        raise bad("sampling", str(error)) from error


def of_text(error: Exception, field_name: str) -> Exception:
    """An error of a job; one about its text names the field that it came from, and not its place in a batch."""
    place, _, message = str(error).partition(": ")
    if not isinstance(error, UserError) or place != "conversation 0":
        return error
    return bad(field_name, message, "context_length_exceeded" if "tokens" in message else "invalid_value")


def check_scales(engine: Engine, wanted: str) -> None:
    """Refuse scales that the model does not have."""
    try:
        scale_names(engine.system, wanted)
    except UserError as error:
        raise bad("scales", str(error).replace("--scales", "them")) from error


def check_size(engine: Engine, settings: Sampling) -> None:
    """Refuse a size that the model cannot make, with the nearest that it can."""
    height, width = settings.size
    usual = engine.sampling.size[0] * engine.sampling.size[1]
    try:
        engine.system.latent_shape(height, width)
        if engine.system.scales:
            engine.system.scale_sizes(height, width)
        fits = height * width <= MOST_AREA * usual and max(height, width) <= longest(engine)
    except UserError:
        fits = False
    if not fits:
        near_h, near_w = nearest_size(engine, height, width)
        raise bad("size", f"{width}x{height} is no size of this model; the nearest is {near_w}x{near_h}")


def longest(engine: Engine) -> int:
    """The greatest side that a model makes, in pixels."""
    return engine.system.longest_side or 1 << 14


def nearest_size(engine: Engine, height: int, width: int) -> tuple[int, int]:
    """(height, width) near the wanted one that the model makes."""
    system = engine.system
    step = system.image_step if isinstance(system, AssembledSystem) else 16
    longest_side = longest(engine) // step * step
    area = MOST_AREA * engine.sampling.size[0] * engine.sampling.size[1]
    scale = min(1.0, (area / (height * width)) ** 0.5)
    sides = [min(longest_side, max(step, round(side * scale / step) * step)) for side in (height, width)]
    while sides[0] * sides[1] > area:
        sides[sides.index(max(sides))] -= step
    return sides[0], sides[1]


def count_words(engine: Engine, text: str) -> int:
    """Tokens of a text; 0 where the model has no tokenizer of its own."""
    tokenizer: Any = getattr(engine.system, "tokenizer", None)
    return 0 if tokenizer is None else len(tokenizer(text)["input_ids"])
