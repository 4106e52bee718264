"""What a call may be given and tells on its way: seeds, generators, forms of output, steps with previews, placement."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from diptych.core.errors import UserError
from diptych.inference.engine import Engine
from diptych.inference.progress import DrawingStep
from diptych.recipes.load import load

PROMPTS = ["a red circle", "two"]


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> Engine:
    return load(str(tiny_model), device="cpu")


def pixels(images: list[Image.Image]) -> np.ndarray[Any, Any]:
    return np.stack([np.asarray(image, dtype=np.int16) for image in images])


def test_an_image_is_its_seeds(engine: Engine) -> None:
    many = pixels(engine.generate(PROMPTS, n=2, seed=[5, 6, 7, 8], batch_size=3))
    for place, seed in enumerate((5, 6, 7, 8)):
        alone = pixels(engine.generate(PROMPTS[place // 2], seed=seed))
        assert np.abs(alone[0] - many[place]).max() <= 1, "wherever the seed stands"
    shared = pixels(engine.generate(PROMPTS, n=2, seed=[5, 6]))
    assert np.abs(shared[0] - many[0]).max() <= 1
    assert np.abs(shared[2] - pixels(engine.generate(PROMPTS[1], seed=5))[0]).max() <= 1
    assert np.abs(many[0] - many[1]).max() > 2
    with pytest.raises(UserError, match="3 seeds for 2 requests of 2 images"):
        engine.generate(PROMPTS, n=2, seed=[1, 2, 3])


def test_a_generator_draws_the_seeds(engine: Engine) -> None:
    first, again = (pixels(engine.generate(PROMPTS, generator=torch.Generator().manual_seed(4))) for _ in range(2))
    assert np.array_equal(first, again)
    generator = torch.Generator().manual_seed(4)
    engine.generate(PROMPTS, generator=generator)
    assert np.abs(pixels(engine.generate(PROMPTS, generator=generator)) - first).max() > 2, "it has moved on"
    with pytest.raises(UserError, match="a seed or a generator, not both"):
        engine.generate(PROMPTS, seed=3, generator=generator)


def test_what_is_no_image_is_said(engine: Engine) -> None:
    for wrong in (3, None, [3], object()):
        with pytest.raises(UserError, match="an image is a Pillow image, a path, bytes, an array or a tensor, not"):
            engine.edit(wrong, "three")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


def test_where_it_is_and_in_which_format(engine: Engine) -> None:
    assert (engine.device, engine.dtype) == (torch.device("cpu"), torch.float32)


def test_forms_of_output(engine: Engine) -> None:
    picture, array, tensor = (engine.generate("two", output_type=form)[0] for form in ("pil", "np", "pt"))
    assert np.array_equal(np.asarray(picture), array)
    assert array.dtype == np.uint8
    assert tensor.shape == (3, 32, 32)
    assert np.array_equal(((tensor + 1) * 127.5).round().permute(1, 2, 0).numpy().astype(np.uint8), array)
    edited = engine.edit(picture, "three", output_type="pt")[0]
    assert edited.shape == (3, 32, 32)
    with pytest.raises(UserError, match="unknown output_type 'png'"):
        engine.generate("two", output_type="png")  # type: ignore[arg-type]


def test_steps_with_previews(engine: Engine) -> None:
    steps: list[DrawingStep] = []
    options: dict[str, Any] = {"n": 2, "steps": 3, "batch_size": 3, "on_step": steps.append}
    images = engine.generate(PROMPTS, **options)
    # Two requests of two images in batches of three: of three images, then of one.
    assert [(step.number, step.of) for step in steps] == [(k, 6) for k in range(1, 7)]
    assert [step.requests for step in steps] == [(0, 0, 1)] * 3 + [(1,)] * 3
    last = steps[2].preview()
    assert len(last) == 3
    assert np.abs(pixels(last) - pixels(images[:3])).max() <= 1, "the last step goes to what it points to"
    first = steps[0].preview()
    assert np.abs(pixels(first) - pixels(images[:3])).max() > 2
    assert np.array_equal(pixels(engine.generate(PROMPTS, n=2, steps=3, batch_size=3)), pixels(images))

    def stop(step: DrawingStep) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.generate("two", on_step=stop)


def test_what_it_says_of_itself_and_where_it_is(tiny_model: Path) -> None:
    engine = load(str(tiny_model))
    said = repr(engine)
    assert str(tiny_model) in said
    for part in ("composed", "parameters in float32 on cpu", "text_to_image", "32x32, 2 steps of euler, cfg 2"):
        assert part in said
    before = pixels(engine.generate("two"))
    assert engine.to("cpu") is engine
    assert engine.to(dtype="bfloat16").system.backbone.embed(torch.tensor([[3]])).dtype == torch.bfloat16  # type: ignore[union-attr]
    assert "bfloat16" in repr(engine)
    after = pixels(engine.generate("two"))
    assert np.abs(after - before).mean() < 20
    half = load(str(tiny_model), dtype=torch.bfloat16)
    assert np.array_equal(pixels(half.generate("two")), after)
    with pytest.raises(UserError, match="unknown dtype 'bf16'"):
        engine.to(dtype="bf16")
    with pytest.raises(UserError, match="device cuda:9: not available here"):
        engine.to("cuda:9")


def test_seeds_of_any_type(engine: Engine) -> None:
    """A number is the same seed whatever library it comes from."""
    wanted = pixels(engine.generate("two", n=2, seed=[5, 6]))
    for given in (np.array([5, 6]), torch.tensor([5, 6]), range(5, 7), (np.int64(5), torch.tensor(6))):
        assert np.array_equal(pixels(engine.generate("two", n=2, seed=given)), wanted)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    alone = pixels(engine.generate("two", seed=5))
    for one in (np.int64(5), torch.tensor(5)):
        assert np.array_equal(pixels(engine.generate("two", seed=one)), alone)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


def test_a_generator_for_each_image(engine: Engine) -> None:
    made = [torch.Generator().manual_seed(seed) for seed in (4, 9)]
    many = pixels(engine.generate(PROMPTS, generator=made))
    alone = pixels(engine.generate(PROMPTS[1], generator=torch.Generator().manual_seed(9)))
    assert np.abs(many[1] - alone[0]).max() <= 1


@pytest.mark.parametrize(
    ("call", "says"),
    [
        ({"seed": None}, "seed must be a whole number, not None"),
        ({"seed": "3"}, "seed must be a whole number, not '3'"),
        ({"seed": 3.0}, r"seed must be a whole number, not 3\.0"),
        ({"seed": True}, "seed must be a whole number, not True"),
        ({"seed": ["a"]}, "seed 0 must be a whole number, not 'a'"),
        ({"n": 2.0}, r"n must be a whole number, not 2\.0"),
        ({"n": "2"}, "n must be a whole number, not '2'"),
        ({"generator": 5}, "generator must be a torch.Generator, or a list of them, not 5"),
        ({"generator": [torch.Generator()] * 3}, "3 generators for 1 images"),
        ({"prompt": None}, "the prompt must be a text, not None"),
        ({"prompt": ["two", 5]}, "prompt 1 must be a text, not 5"),
        ({"prompt": " "}, "the prompt is empty"),
        ({"guidance_scale": 2.0}, "unknown option 'guidance_scale'; it is cfg here"),
        ({"num_inference_steps": 2}, "unknown option 'num_inference_steps'; it is steps here"),
        ({"height": 32}, r"unknown option 'height'; it is size=\(height, width\) here"),
    ],
)
def test_what_a_call_refuses(engine: Engine, call: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        engine.generate(**{"prompt": "two", **call})


def test_words_and_images_in_the_wrong_order(engine: Engine) -> None:
    picture = Image.new("RGB", (32, 32))
    for call in (engine.edit, engine.ask):
        with pytest.raises(UserError, match="must be a text, not"):
            call("make it blue", picture)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
        with pytest.raises(UserError, match="is empty"):
            call(picture, " ")
    with pytest.raises(UserError, match="1 images but 2 instructions"):
        engine.edit(picture, ["make it blue", "make it red"])
    chat = engine.chat()
    with pytest.raises(UserError, match="the turn must be a text"):
        chat.say(picture, "what is it?")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    with pytest.raises(UserError, match="max_new_tokens must be at least 1, not 0"):
        engine.ask(picture, "what is it?", max_new_tokens=0)
    with pytest.raises(UserError, match="max_new_tokens must be at least 1, not -1"):
        engine.chat(max_new_tokens=-1)


def test_names_devices_and_formats_as_objects(tiny_model: Path) -> None:
    engine = load(tiny_model, device=torch.device("cpu"))
    assert engine.name == str(tiny_model)
    assert engine.to(torch.bfloat16).dtype == torch.bfloat16
    for wrong in (None, 5):
        with pytest.raises(UserError, match="a MODEL is the name of one or a folder, not"):
            load(wrong)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
