"""Every bad input of the corpus ends in one line that names it, and in its exit code: no traceback, nothing accepted.

The corpus is data: the JSONL files beside this one, a line for each input (`world.Entry`).
"""

from __future__ import annotations

import os
import re
import signal
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from torch import Tensor

from bad_input import world
from diptych.core.prepared import PreparedBatch, map_tensors
from diptych.recipes import check
from diptych.recipes.check import SystemReport
from diptych.recipes.estimate import MemoryPlan
from diptych.recipes.recipe import Recipe, StageSpec
from diptych.systems.base import System
from diptych.training.memory import StepMemory

CORPUS = {path.stem: world.entries(path) for path in sorted(Path(__file__).parent.glob("*.jsonl"))}
EVERY = [pytest.param(entry, id=f"{name}-{entry.id}") for name, rows in CORPUS.items() for entry in rows]
SECONDS = 120
TRACED: dict[str, tuple[StepMemory, list[float]]] = {}
DESCRIBED: dict[str, SystemReport] = {}
STARTED: dict[str, System] = {}


def test_the_corpus_is_large_and_its_names_are_its_own() -> None:
    assert len(EVERY) >= 300
    assert max(Counter(param.id for param in EVERY).values()) == 1


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty current folder."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # which was read when it was imported
    yield folder
    for path in folder.rglob("*"):
        if path.is_dir() and not path.is_symlink():
            path.chmod(0o755)


@pytest.fixture(autouse=True)
def _traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hundreds of entries check one small system, of whose memory none says anything: a step of the same settings on
    batches of the same shapes is traced once. `tests/recipes` has the tests of what is traced."""
    trace = MemoryPlan._traced

    def traced(
        plan: MemoryPlan, name: str, spec: StageSpec, batches: list[PreparedBatch], flops: list[float]
    ) -> StepMemory:
        settings = {key: value for key, value in vars(spec).items() if key != "data"}
        inputs: list[Tensor] = []
        for batch in batches:
            map_tensors(batch.inputs, inputs.append)
        shapes = [(batch.tasks, batch.counts) for batch in batches], [(x.shape, x.dtype) for x in inputs]
        key = repr((plan.recipe.system, plan.recipe.start, plan.recipe.run, plan.processes, name, settings, shapes))
        if key not in TRACED:
            TRACED[key] = (trace(plan, name, spec, batches, flops), list(flops))
        memory, counted = TRACED[key]
        flops[:] = counted
        return memory

    monkeypatch.setattr(MemoryPlan, "_traced", traced)


@pytest.fixture(autouse=True)
def _looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does it say anything of a sound system itself: what differs in nothing but its data is described and started
    once. One that is refused is refused anew each time."""
    describe, begin = check.check_system, check.start_weights

    def described(recipe: Recipe, *, processes: int = 1) -> SystemReport:
        key = repr((without_sources(recipe), processes))
        if key not in DESCRIBED:
            DESCRIBED[key] = describe(recipe, processes=processes)
        return DESCRIBED[key]

    def started(recipe: Recipe, *, quantized: bool = True) -> System:
        key = repr((without_sources(recipe), quantized))
        if key not in STARTED:
            STARTED[key] = begin(recipe, quantized=quantized)
        return STARTED[key].requires_grad_(False)

    monkeypatch.setattr(check, "check_system", described)
    monkeypatch.setattr(check, "start_weights", started)


def without_sources(recipe: Recipe) -> tuple[object, ...]:
    """A recipe, with no more of its sources than their tasks and weights."""
    stages = {
        name: (
            replace(stage, data=replace(stage.data, sources={})),
            [(source.task, source.weight) for source in stage.data.sources.values()],
        )
        for name, stage in recipe.stages.items()
    }
    return replace(recipe, stages={}), stages


@contextmanager
def ended_when_it_hangs() -> Iterator[None]:
    """A command that hangs is ended; the alarm is on for that long alone, as it would end pytest's own steps too."""

    def late(number: int, frame: object) -> None:
        raise AssertionError(f"no answer in {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("entry", EVERY)
def test_bad_input(
    entry: world.Entry,
    place: Path,
    tiny_model: Path,
    tiny_mllm: Path,
    tiny_recipe: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if os.geteuid() == 0 and any(isinstance(made, dict) and "mode" in made for made in entry.files.values()):
        pytest.skip("rights do not bind the superuser")
    for name, value in entry.env.items():
        monkeypatch.setenv(name, value)
    places = {"tiny": str(tiny_model), "mllm": str(tiny_mllm), "recipe": str(tiny_recipe), "here": str(place)}
    with ended_when_it_hangs():
        code = world.run(entry, place, places)
    out, err = capsys.readouterr()
    said = err if entry.code else out
    assert "Traceback" not in err
    assert code == entry.code, err or out
    assert re.search(entry.says, said), said
    if code == 2:
        lines = [line for line in err.splitlines() if line.startswith("diptych: error: ")]
        assert len(lines) == 1, err
        assert err.rstrip().endswith(lines[0]), "the error is the last word"
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f]", re.sub(r"\r[^\n]*", "", err) + out), "nothing steers the terminal"
