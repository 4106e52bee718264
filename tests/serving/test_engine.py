"""Requests that share steps give what each gives alone."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import diptych
from diptych.core.condition import TokenCondition
from diptych.core.draws import key
from diptych.core.errors import UserError
from diptych.core.sample import IMAGE_PLACEHOLDER, Message, Sample
from diptych.core.tokens import likeliest
from diptych.data.imaging import from_pil
from diptych.inference.engine import Engine
from diptych.serving import memory
from diptych.serving.drawing import Conditions, Joined, Picture, advance, sized
from diptych.serving.jobs import DrawingJob, Drawn, Event, TextJob, Written
from diptych.serving.memory import Costs
from diptych.serving.metrics import Metrics
from diptych.serving.scheduler import Bounds, QueueFull, Scheduler
from diptych.serving.writing import Answer, Row, TextBatch

WORDS = ["a red circle left of a blue square", "three green crosses", "a yellow triangle"]


@pytest.fixture
def scheduler() -> Iterator[Scheduler]:
    made = Scheduler(Bounds(rows=8, queue=16), Metrics())
    yield made
    made.close()


class Box:
    """Collects the events of a job."""

    def __init__(self) -> None:
        self.events: queue.Queue[Event] = queue.Queue()
        self.seen: list[Event] = []

    def __call__(self, event: Event) -> None:
        self.events.put(event)

    def result(self, seconds: float = 60) -> Any:
        while True:
            event = self.events.get(timeout=seconds)
            self.seen.append(event)
            if event.kind == "done":
                return event.value
            if event.kind == "failed":
                raise event.value


def drawing(engine: Engine, sample: Sample, seeds: list[int], box: Box, **options: Any) -> DrawingJob:
    settings = engine.settings(options, edits=sample.task == "edit")
    return DrawingJob(
        engine=engine, tell=box, sample=sample, keys=[key(s, 0, 0) for s in seeds], settings=settings,
        sized="size" in options,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["toy/iomm", "toy/hieraquery", "toy/omnigen2", "toy/ovis-u1", "toy/bagel"])
def test_together_as_alone(name: str, scheduler: Scheduler) -> None:
    engine = diptych.load(name, device="cpu")
    picture = engine.generate(WORDS[0], seed=[9], steps=3)[0]
    requests: list[tuple[Sample, list[int], dict[str, Any]]] = [
        (Sample(id="a", task="text_to_image", text=WORDS[0]), [1, 2], {"steps": 4}),
        (Sample(id="b", task="text_to_image", text=WORDS[1]), [3], {"steps": 7, "cfg": 2.0}),
        (Sample(id="c", task="text_to_image", text=WORDS[2]), [4], {"steps": 5, "cfg": 1.0, "solver": "heun"}),
        (
            Sample(id="d", task="text_to_image", text=WORDS[2]),
            [4],
            {"steps": 5, "solver": "unipc", "prompt_expansion": 0},
        ),
        (
            Sample(id="e", task="edit", text="make the background navy", context_images=(from_pil(picture),)),
            [5],
            {"steps": 4, "image_cfg": 1.5},
        ),
    ]
    boxes = [Box() for _ in requests]
    for (sample, seeds, options), box in zip(requests, boxes, strict=True):
        scheduler.submit(drawing(engine, sample, seeds, box, **options))
    for (sample, seeds, options), box in zip(requests, boxes, strict=True):
        drawn: Drawn = box.result()
        if sample.task == "edit":
            alone = engine.edit(picture, sample.text, n=len(seeds), seed=seeds, output_type="np", **options)
        else:
            alone = engine.generate(sample.text, n=len(seeds), seed=seeds, output_type="np", **options)
        for images, wanted in zip(drawn.images, alone, strict=True):
            difference = np.abs(np.asarray(images[-1]).astype(int) - wanted.astype(int))
            assert difference.max() <= 1, f"{name}, {sample.id}: pictures differ by {difference.max()} levels of 255"
    assert scheduler.metrics.value("diptych_decoder_rows_total") > scheduler.metrics.value("diptych_decoder_runs_total")


@pytest.mark.parametrize("name", ["toy/iomm", "toy/bagel"])
def test_steps_that_are_shared_change_no_number(name: str) -> None:
    engine = diptych.load(name, device="cpu")
    options = {"steps": 6, "prompt_expansion": 0}
    alone = engine.generate(WORDS, seed=[5, 6, 7], output_type="pt", batch_size=1, **options)
    conditions, joined = Conditions(), Joined()
    pictures: list[Picture] = []
    for text, seed in zip(WORDS, [5, 6, 7], strict=True):  # each begins a step later than the one before
        sample = Sample(id=text, task="text_to_image", text=text, size=engine.sampling.size)
        with torch.no_grad():
            pictures.append(Picture(engine, conditions, sample, key(seed, 0, 0), engine.settings(options)))
        advance(engine, pictures, joined, 8)
    while left := [picture for picture in pictures if not picture.done]:
        advance(engine, left, joined, 8)
    for picture, wanted in zip(pictures, alone, strict=True):
        torch.testing.assert_close(picture.pixels[-1], wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["toy/ovis-u1", "toy/omnigen2"])
def test_edits_that_share_steps_change_no_number(name: str) -> None:
    engine = diptych.load(name, device="cpu")
    options = {"steps": 3, "image_cfg": 1.5, "prompt_expansion": 0}
    sources = engine.generate(WORDS[:2], seed=[1, 2], steps=2, prompt_expansion=0)
    words = ["make the background navy", "remove the cross"]
    alone = [
        engine.edit(source, text, seed=[seed], output_type="pt", **options)[0]
        for source, text, seed in zip(sources, words, [5, 6], strict=True)
    ]
    conditions, joined = Conditions(), Joined()
    settings = engine.settings(options, edits=True)
    pictures: list[Picture] = []
    rows: list[int] = []
    for source, text, seed in zip(sources, words, [5, 6], strict=True):
        sample = Sample(id=text, task="edit", text=text, context_images=(from_pil(source),))
        with torch.no_grad():
            sample = sized(engine, sample, settings, False)
            pictures.append(Picture(engine, conditions, sample, key(seed, 0, 0), settings))
        rows += advance(engine, pictures, joined, 8)
    while left := [picture for picture in pictures if not picture.done]:
        rows += advance(engine, left, joined, 8)
    assert max(rows) == 2 * min(rows), "two edits share runs"
    for picture, wanted in zip(pictures, alone, strict=True):
        torch.testing.assert_close(picture.pixels[-1], wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["toy/mllm", "toy/ovis-u1"])
def test_texts_that_share_steps_change_no_number(name: str) -> None:
    engine = diptych.load(name, device="cpu")
    picture = from_pil(Image.new("RGB", (32, 32), "red"))
    questions = ["how many circles are there?", "describe the image.", "yes?"]

    def row(question: str, seen: list[torch.Tensor]) -> Row:
        def choose(logits: torch.Tensor, step: int) -> torch.Tensor:
            seen.append(logits[0].clone())
            return likeliest(logits, step)

        conversation = [Message(role="user", text=f"{IMAGE_PLACEHOLDER}\n{question}")]
        return Row(engine, conversation, [picture], max_new_tokens=6, choose=choose)

    def written(batch: TextBatch) -> None:
        while batch.rows:
            batch.step()

    alone: list[list[torch.Tensor]] = [[] for _ in questions]
    for question, seen in zip(questions, alone, strict=True):
        batch = TextBatch(engine)
        batch.add(row(question, seen))
        written(batch)
    together: list[list[torch.Tensor]] = [[] for _ in questions]
    batch = TextBatch(engine)
    for question, seen in zip(questions, together, strict=True):  # each joins a token after the one before
        batch.add(row(question, seen))
        batch.step()
    written(batch)
    for one, other in zip(alone, together, strict=True):
        assert len(one) == len(other) > 0
        torch.testing.assert_close(torch.stack(other), torch.stack(one), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["toy/mllm", "toy/ovis-u1", "toy/bagel"])
def test_texts_together_as_alone(name: str, scheduler: Scheduler) -> None:
    engine = diptych.load(name, device="cpu")
    picture = diptych.load("toy/iomm", device="cpu").generate(WORDS[0], seed=[9], steps=5)[0]
    questions = ["how many circles are there?", "what color is the square?", "describe the image."]
    boxes = [Box() for _ in questions]
    for question, box in zip(questions, boxes, strict=True):
        conversation = [Message(role="user", text=f"{IMAGE_PLACEHOLDER}\n{question}")]
        scheduler.submit(
            TextJob(
                engine=engine, tell=box, conversation=conversation, images=[from_pil(picture)], max_new_tokens=24,
                choose=likeliest,
            )
        )  # fmt: skip
    for question, box in zip(questions, boxes, strict=True):
        written: Written = box.result()
        assert written.text == engine.ask(picture, question, max_new_tokens=24)
        assert "".join(event.value for event in box.seen if event.kind == "text") == written.text


def test_a_cancelled_request_frees_its_place_within_a_step(scheduler: Scheduler) -> None:
    engine = diptych.load("toy/iomm", device="cpu")
    box = Box()
    job = drawing(engine, Sample(id="a", task="text_to_image", text=WORDS[0]), [1] * 8, box, steps=5000)
    scheduler.submit(job)
    wait_for(lambda: bool(scheduler.running) and bool(scheduler.running[0].pictures))
    before = scheduler.metrics.value("diptych_steps_total")
    job.cancel()
    wait_for(lambda: not scheduler.running)
    # The round that was on its way, and the one that finds the request cancelled before it does anything else.
    assert scheduler.metrics.value("diptych_steps_total") - before <= 2
    after = Box()
    scheduler.submit(drawing(engine, Sample(id="b", task="text_to_image", text=WORDS[1]), [1], after, steps=2))
    after.result(20)
    assert all(event.kind in ("started", "text") for event in box.seen)
    assert not scheduler.uses(engine)


@pytest.mark.parametrize("length", [1, 2, 3])
def test_stop_texts_are_found_across_tokens(length: int) -> None:
    text = "a red circle at the bottom left"
    tokens = [text[place : place + length] for place in range(0, len(text), length)]
    for start in range(1, len(text)):
        for end in range(start + 1, min(start + 7, len(text)) + 1):
            stop, told = text[start:end], list[str]()
            answer = Answer(lambda ids: "".join(tokens[: len(ids)]), [stop, "never"], told.append)
            for number in range(len(tokens)):
                answer.add(number)
                if answer.stopped:
                    break
            wanted = text[: text.index(stop)]
            assert (answer.stopped, answer.end(), "".join(told)) == (True, wanted, wanted), stop


def test_the_time_to_wait_goes_by_what_runs() -> None:
    scheduler = Scheduler(Bounds(), Metrics())
    scheduler._seconds = 8.0
    assert scheduler.wait() == 8
    now = time.monotonic()
    for started, wanted in (([now - 2], 6), ([now - 100], 101), ([now - 100, now - 5], 3), ([now - 1e6], 600)):
        scheduler.running = [SimpleNamespace(job=SimpleNamespace(started=each)) for each in started]  # type: ignore[misc]
        assert wanted - 1 <= scheduler.wait() <= wanted
    scheduler.running = []
    scheduler.close()


def test_the_queue_is_bounded() -> None:
    engine = diptych.load("toy/iomm", device="cpu")
    scheduler = Scheduler(Bounds(rows=1, queue=2), Metrics())
    sample = Sample(id="a", task="text_to_image", text=WORDS[0])
    scheduler.submit(drawing(engine, sample, [1], Box(), steps=50_000))
    wait_for(lambda: bool(scheduler.running))
    for _ in range(2):
        scheduler.submit(drawing(engine, sample, [1], Box(), steps=1))
    with pytest.raises(QueueFull) as caught:
        scheduler.submit(drawing(engine, sample, [1], Box(), steps=1))
    assert 1 <= caught.value.wait <= 600
    scheduler.close()


def test_no_more_is_begun_than_memory_holds() -> None:
    engine = diptych.load("toy/iomm", device="cpu")
    scheduler = Scheduler(Bounds(rows=32, memory=250, queue=4), Metrics())
    sample = Sample(id="a", task="text_to_image", text=WORDS[0])
    boxes = [Box() for _ in range(6)]

    def make(box: Box, cost: int, steps: int) -> DrawingJob:
        job = drawing(engine, sample, [1], box, steps=steps, prompt_expansion=0)
        job.cost = cost
        return job

    with pytest.raises(UserError, match="takes 0 MB of memory"):
        scheduler.submit(make(Box(), 251, 1))
    most = 0
    for box in boxes[:2]:
        scheduler.submit(make(box, 100, 40))
    wait_for(lambda: len(scheduler.running) == 2)
    for box in boxes[2:]:
        scheduler.submit(make(box, 100, 2))
    with pytest.raises(QueueFull) as caught:
        scheduler.submit(make(Box(), 100, 1))
    assert 1 <= caught.value.wait <= 600
    while scheduler.running or scheduler.waiting:
        most = max(most, sum(running.job.cost for running in list(scheduler.running)))
        time.sleep(0.005)
    for box in boxes:
        box.result()
    assert most == 200, "two fit, a third does not"
    scheduler.close()


def test_costs_are_of_each_branch_and_each_image() -> None:
    engine = diptych.load("toy/ovis-u1", device="cpu")
    costs = Costs(image=10, edit=20, text=5)
    drawn, edited = Sample(id="a", task="text_to_image", text="a"), Sample(id="a", task="edit", text="a")
    assert costs.drawing(engine.settings({"cfg": 1.0}), drawn, 1, 1.0) == 10
    assert costs.drawing(engine.settings({"cfg": 4.0}), drawn, 3, 4.0) == 2 * 3 * 4 * 10
    assert costs.drawing(engine.settings({"cfg": 4.0, "image_cfg": 1.5}, edits=True), edited, 1, 1.0) == 3 * 20
    assert costs.writing(0, 64) == 5
    assert costs.writing(3, 2048) == 30


def test_costs_are_measured_for_each_kind(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="diptych")
    engine = diptych.load("toy/ovis-u1", device="cpu")
    taken = 0

    def stand_in(name: str, each: int) -> None:
        """A call of the engine that takes so many bytes for each row."""

        def call(given: Any, *_: Any, n: int = 0, **__: Any) -> None:
            nonlocal taken
            taken = (500 << 20) + each * (n or len(given))

        monkeypatch.setattr(engine, name, call)

    def peak(_: Engine, run: Callable[[], Any]) -> int:
        run()
        return taken

    monkeypatch.setattr(memory, "peak", peak)
    for name, each in (("generate", 40 << 20), ("edit", 90 << 20), ("ask", 20 << 20)):
        stand_in(name, each)
    # Ovis-U1 compares two versions of a request, and three where it edits with guidance by the image.
    rows = [
        memory.branches(engine.settings({}), Sample(id="a", task="text_to_image", text="a")),
        memory.branches(engine.settings({}, edits=True), Sample(id="a", task="edit", text="a")),
    ]
    made = memory.measured(engine)
    assert (made.image, made.edit, made.text) == ((40 << 20) // rows[0], (90 << 20) // rows[1], 20 << 20)
    assert all(f"{kind} " in caplog.text for kind in ("image", "edit", "text"))
    # What is too small to be seen is counted with a floor.
    stand_in("ask", 1)
    assert memory.measured(engine).text == memory.FLOOR


def test_a_group_is_never_taken_for_one_that_is_gone() -> None:
    kinds: list[Any] = [TokenCondition(tokens=torch.full((1, 2, 3), value), mask=torch.ones(1, 2, dtype=torch.bool))
                        for value in (1.0, 2.0)]  # fmt: skip
    joined = Joined()

    def of(condition: Any) -> Any:
        """A request's conditions, which are gone after it."""
        member: Any = SimpleNamespace(conditions={"full": condition})
        return joined.of([member], ("full",))

    assert of(kinds[0]) is kinds[0]
    assert all(of(kinds[1]) is kinds[1] for _ in range(50)), "another request's condition was taken"
    joined.forget()
    joined.forget()
    assert not joined._kept


def wait_for(condition: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)
