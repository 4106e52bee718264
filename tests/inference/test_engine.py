"""The engine over a real tiny system: what is encoded how often, and what depends on what."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from diptych.core.draws import Draws
from diptych.core.errors import UserError
from diptych.core.sample import Batch, Sample
from diptych.data.imaging import from_pil, image_list, to_pil
from diptych.inference.engine import Engine
from diptych.inference.sampling import Sampling
from diptych.recipes.load import load

PROMPTS = ["a red circle", "how many blue crosses are there left of a square?", "two"]


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> Engine:
    return load(str(tiny_model))


@pytest.fixture
def encoded(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Requests by call of `encode`, as "id:text" (with "+" where an image is read)."""
    calls: list[list[str]] = []
    encode = engine.system.encode

    def counted(batch: Batch, draws: Draws | None = None) -> Any:
        assert draws is None
        calls.append([f"{sample.id}:{sample.text}" + "+" * len(sample.context_images) for sample in batch])
        return encode(batch, draws)

    monkeypatch.setattr(engine.system, "encode", counted)
    return calls


def pixels(images: list[Image.Image]) -> np.ndarray[Any, Any]:
    return np.stack([np.asarray(image, dtype=np.int16) for image in images])


def test_conditions_are_computed_once(engine: Engine, encoded: list[list[str]]) -> None:
    seen: list[tuple[int, int]] = []
    images = engine.generate(PROMPTS, n=5, batch_size=2, progress=lambda done, of: seen.append((done, of)))
    assert len(images) == 15
    requests = [[f"prompt {i}:{PROMPTS[i]}" for i in group] for group in ([0, 1], [2])]
    assert encoded == [["prompt 0:"], *requests]  # the null condition, then each prompt, once
    assert [done for done, _ in seen] == [2, 4, 6, 8, 10, 12, 14, 15]
    assert {of for _, of in seen} == {15}


def test_no_guidance_needs_no_null(engine: Engine, encoded: list[list[str]]) -> None:
    engine.generate("a red circle", n=3, cfg=1.0)
    assert encoded == [["prompt 0:a red circle"]]


@pytest.mark.parametrize(
    ("cfg", "image_cfg", "expected"),
    [
        (1.0, 1.0, [["edit 0:paint it+"]]),
        (3.0, 1.0, [["edit 0:paint it+"], ["edit 0:+"]]),
        (3.0, 1.5, [["edit 0:"], ["edit 0:paint it+"], ["edit 0:+"]]),
    ],
)
def test_branches_of_an_edit(
    cfg: float, image_cfg: float, expected: list[list[str]], engine: Engine, encoded: list[list[str]]
) -> None:
    picture = Image.new("RGB", (32, 32), "red")
    assert len(engine.edit(picture, "paint it", cfg=cfg, image_cfg=image_cfg)) == 1
    assert encoded == expected


def test_rules_negatives_and_several_images(engine: Engine, encoded: list[list[str]]) -> None:
    picture = Image.new("RGB", (32, 32), "red")
    options: dict[str, Any] = {"guidance": "omnigen2", "negative": "blurry"}
    engine.edit([picture, picture], "mix", cfg=3.0, **options)
    assert encoded == [["edit 0:blurry"], ["edit 0:mix++"]]
    encoded.clear()
    engine.edit([[picture], [picture, picture]], ["a", "b"], cfg=3.0, image_cfg=2.0, **options)
    assert encoded == [["edit 0:blurry"], ["edit 0:a+", "edit 1:b++"], ["edit 0:blurry+", "edit 1:blurry++"]]


@pytest.fixture
def thinking(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Engine:
    prompts = replace(engine.system.settings.prompts, expansion="what is in {text}?")
    monkeypatch.setattr(engine.system, "settings", replace(engine.system.settings, prompts=prompts))
    return engine


def test_every_image_has_a_thought_of_its_own(thinking: Engine, encoded: list[list[str]]) -> None:
    expansions: list[str] = []
    options: dict[str, Any] = {"n": 3, "prompt_expansion": 6, "prompt_expansion_temperature": 2.0, "cfg": 1.0}
    images = pixels(thinking.generate(PROMPTS, expansions=expansions, batch_size=2, **options))
    assert len(images) == len(expansions) == 9
    assert len(set(expansions)) > 6
    ids = [f"prompt {i}" for i in range(3) for _ in range(3)]
    assert [one for call in encoded for one in call] == [
        f"{name}:{text}" for name, text in zip(ids, expansions, strict=True)
    ]
    again: list[str] = []
    apart = np.abs(pixels(thinking.generate(PROMPTS, expansions=again, batch_size=16, **options)) - images)
    assert again == expansions, "the same numbers, whatever the batch"
    assert apart.max() <= 1
    one: list[str] = []
    thinking.generate(PROMPTS[:1], expansions=one, **options)
    assert one == expansions[:3]


def test_likeliest_expansions_of_images_of_several_sizes(thinking: Engine) -> None:
    samples = [
        Sample(id=str(i), task="text_to_image", text=text, size=(16 * (1 + i % 2),) * 2)
        for i, text in enumerate(PROMPTS)
    ]
    expansions: list[str] = []
    thinking.tensors(samples, n=2, seed=0, prompt_expansion=4, expansions=expansions)
    assert expansions[::2] == expansions[1::2]
    alone: list[str] = []
    for sample in samples:
        thinking.tensors([sample], n=1, seed=0, prompt_expansion=4, expansions=alone)
    assert expansions[::2] == alone


def test_expansions_that_cannot_be(engine: Engine, thinking: Engine) -> None:
    with pytest.raises(UserError, match="prompt_expansion_temperature must not be negative"):
        thinking.generate("a red circle", prompt_expansion=4, prompt_expansion_temperature=-1.0)
    with pytest.raises(UserError, match="no thinking mode for questions"):
        thinking.ask(None, "how many?", think=True)


def test_requests_with_images_have_no_thought(thinking: Engine) -> None:
    picture = from_pil(Image.new("RGB", (32, 32), "red"))
    edit = Sample(id="a", task="edit", text="paint it", context_images=(picture,))
    expansions: list[str] = []
    (thought,) = thinking.tensors([edit], n=1, seed=0, prompt_expansion=4, expansions=expansions)
    assert expansions == [""]
    assert torch.equal(thought, thinking.tensors([edit], n=1, seed=0)[0])


def test_a_model_without_words_for_it_does_not_think(engine: Engine) -> None:
    with pytest.raises(UserError, match="this model cannot expand prompts; leave prompt_expansion at 0"):
        engine.generate("a red circle", prompt_expansion=4)


def test_guided_steps_alone_are_guided(engine: Engine) -> None:
    plain = pixels(engine.generate("a red circle", cfg=1.0))
    assert np.array_equal(pixels(engine.generate("a red circle", cfg=8.0, cfg_range=(0.1, 0.4))), plain)  # no step
    some = pixels(engine.generate("a red circle", cfg=8.0, cfg_range=(0.0, 0.4)))
    whole = pixels(engine.generate("a red circle", cfg=8.0))
    assert np.abs(some - plain).max() > 2
    assert np.abs(some - whole).max() > 2


def test_any_batch_size_gives_the_same_images(engine: Engine) -> None:
    whole = pixels(engine.generate(PROMPTS, n=2, seed=3))
    for size in (1, 4):
        apart = np.abs(pixels(engine.generate(PROMPTS, n=2, seed=3, batch_size=size)) - whole)
        assert apart.max() <= 1, size  # rounding to 8 bits
    assert pixels(engine.generate(PROMPTS[:1], n=1, seed=3)) == pytest.approx(whole[:1], abs=1)


def test_images_differ_by_prompt_place_and_seed(engine: Engine) -> None:
    a, b = pixels(engine.generate("a red circle", n=2, seed=0))
    (c,) = pixels(engine.generate("a red circle", seed=1))
    (d,) = pixels(engine.generate("a blue square", seed=0, cfg=8.0))
    (e,) = pixels(engine.generate("a red circle", seed=0, cfg=8.0))
    assert all(np.abs(x - y).max() > 2 for x, y in ((a, b), (a, c), (d, e), (a, e)))
    assert a.shape == (32, 32, 3)


def test_options(engine: Engine) -> None:
    (wide,) = engine.generate("a red circle", size=(16, 32))
    assert wide.size == (32, 16)
    (small,) = engine.generate("a red circle", size=16, solver="heun", steps=1)
    assert small.size == (16, 16)


SOLVERS = ["heun", "dpmpp_2m", "unipc", "flow_match_euler"]


@pytest.mark.parametrize("solver", SOLVERS)
def test_solvers_have_their_own_steps_and_guided_times(solver: str, engine: Engine) -> None:
    options: dict[str, Any] = {"steps": 4, "solver": solver}
    plain = pixels(engine.generate("a red circle", cfg=1.0, **options))
    assert np.abs(plain - pixels(engine.generate("a red circle", cfg=1.0, steps=4))).max() > 2
    first = pixels(engine.generate("a red circle", cfg=8.0, cfg_range=(0.0, 0.0), **options))
    assert np.abs(first - plain).max() > 2
    none = pixels(engine.generate("a red circle", cfg=8.0, cfg_range=(0.1, 0.2), **options))
    assert np.array_equal(none, plain), "no step begins in this span"


@pytest.fixture(scope="module")
def shipped() -> tuple[Engine, np.ndarray[Any, Any]]:
    """A trained model of several scales, and the images that many small steps of Euler's give."""
    engine = load("toy/hieraquery")
    return engine, drawn(engine, "euler", 100)


def drawn(engine: Engine, solver: str, steps: int, seed: int = 0) -> np.ndarray[Any, Any]:
    """All scales of an image, one under the other as rows of pixels."""
    options: dict[str, Any] = {"scales": "all", "prompt_expansion": 0, "seed": seed}
    images = engine.generate("a red circle", solver=solver, steps=steps, **options)
    return np.concatenate([np.asarray(image, dtype=np.int16).reshape(-1) for image in images])


@pytest.mark.parametrize("solver", SOLVERS)
def test_every_solver_comes_to_the_image_of_many_small_steps(
    solver: str, shipped: tuple[Engine, np.ndarray[Any, Any]]
) -> None:
    engine, fine = shipped
    assert np.abs(drawn(engine, solver, 20) - fine).mean() < 6
    if solver == "heun":
        assert np.abs(drawn(engine, "euler", 20, seed=1) - fine).mean() > 12, "another seed is another image"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"step": 3}, "unknown option 'step'. Did you mean 'steps'"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"cfg": -1.0}, "must not be negative"),
        ({"timestep_shift": 0.0}, "timestep_shift must be above 0"),
        ({"timestep_shift": "rot"}, "timestep_shift must be above 0, or 'root', 'flux' or 'qwen_image', not 'rot'"),
        ({"cfg_range": (0.6, 0.4)}, "cfg_range must be two rising shares"),
        ({"guidance": "chian"}, "Did you mean 'chain'"),
        ({"size": 30}, "size 30x30 is not divisible by 8"),
        ({"n": 0}, "n must be at least 1"),
        ({"shift_terminal": 1.0}, "shift_terminal must be from 0 to below 1"),
        ({"shift_terminal": 0.1, "solver": "dpmpp_2m"}, "does not go with solver 'dpmpp_2m'"),
        ({"solver": "hein"}, "Did you mean 'heun'"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str, engine: Engine) -> None:
    with pytest.raises(UserError, match=message):
        engine.generate("a red circle", **options)


def test_bad_requests(engine: Engine) -> None:
    picture = Image.new("RGB", (32, 32))
    with pytest.raises(UserError, match="prompt 1 is empty"):
        engine.generate(["a red circle", " "])
    with pytest.raises(UserError, match="1 images but 2 instructions"):
        engine.edit(picture, ["a", "b"])
    with pytest.raises(UserError, match="2 questions need as many images"):
        engine.ask(picture, ["a?", "b?"])


def test_answers(engine: Engine) -> None:
    picture = Image.new("RGB", (32, 32), "blue")
    one = engine.ask(picture, "how many?", max_new_tokens=4)
    assert isinstance(one, str)
    assert engine.ask([picture, picture], ["how many?", "how many?"], max_new_tokens=4) == [one, one]
    assert isinstance(engine.ask(None, "yes?", max_new_tokens=2), str)


def test_pictures_and_tensors() -> None:
    levels = torch.arange(3 * 2 * 4, dtype=torch.uint8).reshape(2, 4, 3).numpy() * 10
    picture = Image.fromarray(levels)
    tensor = from_pil(picture)
    assert tensor.shape == (3, 2, 4)
    assert tensor[0, 0, 0] == -1
    assert np.array_equal(np.asarray(to_pil(tensor)), levels)
    assert from_pil(Image.new("L", (2, 2), 255)).tolist() == [[[1.0, 1.0]] * 2] * 3


def test_edits_and_questions_read_images_as_training_does(tmp_path: Path) -> None:
    """A turned photograph with a path, its bytes, an array or a tensor of it: one and the same request."""
    exif = Image.Exif()
    exif[0x0112] = 6
    levels = np.random.default_rng(0).integers(0, 256, (8, 16, 3), dtype=np.uint8)
    file = tmp_path / "turned.png"
    Image.fromarray(levels).save(file, exif=exif)
    upright = np.rot90(levels, -1)
    expected = torch.from_numpy(upright.copy()).permute(2, 0, 1) / 127.5 - 1
    tensor = torch.from_numpy(upright.copy()).permute(2, 0, 1)
    forms = [file, str(file), file.read_bytes(), Image.open(file), upright, tensor]
    for form in forms:
        torch.testing.assert_close(from_pil(form), expected)
        assert len(image_list(form)) == 1
    clear = Image.new("RGBA", (2, 2), (0, 0, 0, 0))
    assert from_pil(clear).min() == 1
    assert len(image_list([file, [str(file), upright]])) == 3
    with pytest.raises(UserError, match=r"no/such.png: image file missing"):
        from_pil("no/such.png")


def test_defaults_come_with_the_model(engine: Engine) -> None:
    assert engine.sampling == Sampling(size=(32, 32), steps=2, cfg=2.0, batch_size=64)
