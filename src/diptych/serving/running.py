"""Jobs that run: what each has on its way in the engine, and what it does once that is done."""

from __future__ import annotations

import abc
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from diptych.core.draws import Draws
from diptych.core.errors import UserError
from diptych.core.sample import Batch, Message, Sample
from diptych.core.tokens import NextToken, likeliest
from diptych.core.tokens import drawn as drawn_token
from diptych.inference.engine import Engine
from diptych.serving.drawing import Conditions, Joined, Picture, number_format, sized
from diptych.serving.jobs import DrawingJob, Drawn, Event, Job, TextJob, Written
from diptych.serving.writing import Answer, Row, TextBatch, Turns, is_batched
from diptych.systems.composed import ComposedSystem
from diptych.systems.conversation import expand_captions


class Workspace:
    """What the running jobs of one model share."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.conditions = Conditions()
        self.joined = Joined()
        self.texts = TextBatch(engine)


class Running(abc.ABC):
    """A job that was admitted.

    rows: that are being written in the model's batch. turns: that are written beside it. pictures: on their way.
    """

    job: Job

    def __init__(self, space: Workspace) -> None:
        self.space = space
        self.rows: list[Row] = []
        self.turns: list[Turns] = []
        self.pictures: list[Picture] = []

    @abc.abstractmethod
    def text_done(self, text: Row | Turns) -> None:
        """A text of the job is whole."""

    @abc.abstractmethod
    def result(self) -> Any:
        """The job's result, None while something is missing."""

    def close(self) -> None:
        """Free what it holds."""
        self.space.texts.drop(self.rows)
        for turns in self.turns:
            turns.close()
        for picture in self.pictures:
            picture.close()
        self.rows, self.turns, self.pictures = [], [], []

    def write(self, row: Row) -> None:
        """A row joins the model's batch."""
        self.rows.append(row)
        self.space.texts.add(row)


class RunningText(Running):
    """The next turn of a conversation."""

    def __init__(self, job: TextJob, space: Workspace) -> None:
        super().__init__(space)
        self.job = job
        self._written: Written | None = None

        def tell(piece: str) -> None:
            job.tell(Event(kind="text", value=piece))

        engine = job.engine
        if is_batched(engine):
            self.write(
                Row(
                    engine,
                    job.conversation,
                    job.images,
                    max_new_tokens=job.max_new_tokens,
                    choose=job.choose,
                    stop=job.stop,
                    tell=tell,
                )
            )
            return
        system: Any = engine.system
        tokenizer = system.tokenizer
        answer = Answer(lambda ids: str(tokenizer.decode(ids, skip_special_tokens=True)).strip(), job.stop, tell)
        self._answer = answer

        def choose(logits: Tensor, step: int) -> Tensor:
            chosen = job.choose(logits, step)
            answer.add(int(chosen[0]))
            if answer.stopped:
                raise Stopped
            return chosen

        images = [image.to(system.device) for image in job.images]

        def run(chooser: NextToken) -> str:
            with number_format(engine):
                try:
                    (text,) = system.generate_text(
                        [job.conversation], [images], max_new_tokens=job.max_new_tokens, choose=chooser
                    )
                except Stopped:
                    return answer.text
            answer.text = text
            return text

        self.turns.append(Turns(run, choose))

    def text_done(self, text: Row | Turns) -> None:
        if isinstance(text, Row):
            self._written = text.written()
            return
        if text.error is not None:
            raise text.error
        assert isinstance(self.job, TextJob)
        count = len(self._answer.ids)
        finish: Literal["stop", "length"] = "length" if count >= self.job.max_new_tokens else "stop"
        tokens = count_tokens(self.job)
        self._written = Written(text=self._answer.end(), finish=finish, prompt_tokens=tokens, tokens=count)

    def result(self) -> Written | None:
        return self._written


class RunningDrawing(Running):
    """Images of a request: each is described first where the settings ask for that, and then drawn."""

    def __init__(self, job: DrawingJob, space: Workspace) -> None:
        super().__init__(space)
        self.job = job
        self._job = job
        engine, settings = job.engine, job.settings
        self._sample = sized(engine, job.sample, settings, job.sized)
        self._places: dict[int, int] = {}  # of the image that a text is for, by the text's id
        self._by_image: dict[int, Picture] = {}
        self._expansions = [""] * len(job.keys)
        for place, key in enumerate(job.keys):
            if settings.prompt_expansion:
                self._expand(place, key)
            else:
                self._draw(place, self._sample)

    def _expand(self, place: int, key: int) -> None:
        engine, settings, sample = self.space.engine, self._job.settings, self._sample
        system: Any = engine.system
        if not system.expands:
            raise UserError(f"{engine.name}: this model cannot expand prompts; leave prompt_expansion at 0")
        choose: NextToken = likeliest
        if settings.prompt_expansion_temperature:
            uniform = Draws([key], system.device).uniform("thought", settings.prompt_expansion + 1)
            choose = drawn_token(settings.prompt_expansion_temperature, uniform)
        if is_batched(engine) and isinstance(system, ComposedSystem):
            asked = questions(Batch((sample,)), system.options.prompts.expansion)
            if not asked:  # an edit is drawn from its own text
                self._draw(place, sample)
                return
            row = Row(engine, asked[0], [], max_new_tokens=settings.prompt_expansion, choose=choose)
            self._places[id(row)] = place
            self.write(row)
            return

        def run(chooser: NextToken) -> tuple[Batch, list[str]]:
            with number_format(engine):
                return system.expand(Batch((sample,)).to(system.device), settings.prompt_expansion, chooser)

        turns = Turns(run, choose)
        self._places[id(turns)] = place
        self.turns.append(turns)

    def text_done(self, text: Row | Turns) -> None:
        place = self._places[id(text)]
        if isinstance(text, Row):
            system: Any = self.space.engine.system
            said = text.written().text
            batch, written = expand_captions(Batch((self._sample,)), system.options.prompts.expansion, lambda _: [said])
        elif text.error is not None:
            raise text.error
        else:
            batch, written = text.result
        self._expansions[place] = written[0]
        self.job.tell(Event(kind="text", value=written[0], image=place))
        self._draw(place, batch.samples[0])

    def _draw(self, place: int, sample: Sample) -> None:
        job = self._job

        def partial(image: Image.Image, index: int) -> None:
            job.tell(Event(kind="partial", value=image, image=place, index=index))

        with torch.no_grad(), number_format(job.engine):
            picture = Picture(
                job.engine,
                self.space.conditions,
                sample,
                job.keys[place],
                job.settings,
                scales=job.scales,
                partials=job.partials,
                tell=partial,
            )
        self._by_image[place] = picture
        self.pictures.append(picture)

    def result(self) -> Drawn | None:
        if len(self._by_image) < len(self._job.keys) or not all(picture.done for picture in self._by_image.values()):
            return None
        pictures = [self._by_image[place] for place in range(len(self._job.keys))]
        assert self._sample.size is not None
        return Drawn(
            images=[picture.images() for picture in pictures],
            expansions=self._expansions if any(self._expansions) else [],
            size=self._sample.size,
            steps=pictures[0].steps,
            tokens=sum(picture.tokens for picture in pictures),
        )


class Stopped(Exception):
    """A text reached one of its stop texts."""


def questions(batch: Batch, prompt: str) -> list[list[Message]]:
    """What the model is asked so that it expands the captions of a batch."""
    asked: list[list[Message]] = []

    def keep(conversations: list[list[Message]]) -> list[str]:
        asked.extend(conversations)
        return [""] * len(conversations)

    expand_captions(batch, prompt, keep)
    return asked


def count_tokens(job: TextJob) -> int:
    """Tokens of the texts of a conversation, without its images and markers."""
    system: Any = job.engine.system
    return sum(len(system.tokenizer(message.text)["input_ids"]) for message in job.conversation)


def start(job: Job, space: Workspace) -> Running:
    """A job that was admitted begins; a UserError says what it cannot do."""
    return RunningText(job, space) if isinstance(job, TextJob) else RunningDrawing(as_drawing(job), space)


def as_drawing(job: Job) -> DrawingJob:
    assert isinstance(job, DrawingJob)
    return job
