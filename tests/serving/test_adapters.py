"""LoRA by name: chosen by requests, loaded from one folder, and never mixed up where requests run at a time."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import diptych
from diptych.core.draws import key
from diptych.core.errors import UserError
from diptych.core.sample import Sample
from diptych.serving.adapters import Adapters, read_adapters, with_adapter
from diptych.serving.drawing import Conditions, Joined, Picture, advance
from diptych.serving.errors import ApiError
from serving_process import Running, with_key

openai = pytest.importorskip("openai")
PROMPT = "three green crosses"
OPTIONS: dict[str, Any] = {"steps": 4, "prompt_expansion": 0}
FIELDS = {"seed": 3, "num_inference_steps": 4, "think": False}


def levels(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB")).astype(int)


def alone(lora: Path | None = None) -> Image.Image:
    """The picture of FIELDS, by the model itself."""
    model = diptych.load("toy/iomm", device="cpu", lora=() if lora is None else str(lora))
    return model.generate(PROMPT, seed=[3], **OPTIONS)[0]


def asked(client: Any, model: str) -> Image.Image:
    row = client.images.generate(prompt=PROMPT, model=model, extra_body=FIELDS).data[0]
    return Image.open(io.BytesIO(base64.b64decode(row.b64_json)))


def test_a_request_names_its_adapter(locked: Running, adapters: Path) -> None:
    wanted, plain = alone(adapters / "style"), alone()
    assert np.abs(levels(wanted) - levels(plain)).max() > 20
    with with_key(locked, "correct-horse") as client:
        for model, expected in (("toy/iomm:style", wanted), ("toy/iomm", plain)):
            image = asked(client, model)
            assert np.abs(levels(image) - levels(expected)).max() <= 1, model
            assert image.info["model"] == model
        with pytest.raises(openai.NotFoundError) as caught:
            asked(client, "toy/iomm:stile")
    assert caught.value.code == "model_not_found"
    assert "Did you mean 'toy/iomm:style'?" in str(caught.value)


def test_an_adapter_is_loaded_by_name_from_the_folder(locked: Running, adapters: Path) -> None:
    refused = (openai.BadRequestError, openai.NotFoundError)
    with with_key(locked, "wrong") as client, pytest.raises(openai.AuthenticationError):
        client.post("/adapters", body={"name": "ink"}, cast_to=object)
    with with_key(locked, "correct-horse") as client:
        for name in ("../elsewhere", "link", "/etc", "", ".", "a/b", "ink\n"):
            with pytest.raises(refused):
                client.post("/adapters", body={"name": name}, cast_to=object)
        with pytest.raises(openai.NotFoundError, match="Did you mean 'ink'"):
            client.post("/adapters", body={"name": "inc"}, cast_to=object)
        for model in ("toy/mllm", "toy/iomm:style", "toy/none"):
            with pytest.raises(refused):
                client.post("/adapters", body={"name": "ink", "model": model}, cast_to=object)
        first, made = (
            client.post("/adapters", body={"name": "ink", "model": "toy/iomm"}, cast_to=object) for _ in range(2)
        )
        assert made == first
        assert made["id"] == "toy/iomm:ink"
        assert "toy/iomm:ink" in [row.id for row in client.models.list().data]
        image = asked(client, "toy/iomm:ink")
    assert np.abs(levels(image) - levels(alone(adapters / "ink"))).max() <= 1


def test_unlike_adapters_share_weights_and_no_step(adapters: Path) -> None:
    base = diptych.load("toy/iomm", device="cpu")
    engines = {"": base, **{name: with_adapter(base, name, str(adapters / name)) for name in ("style", "ink")}}
    own = {parameter.data_ptr() for parameter in base.system.parameters()}
    for name in ("style", "ink"):
        extra = [key for key, value in engines[name].system.named_parameters() if value.data_ptr() not in own]
        assert extra
        assert all("lora" in key for key in extra), "an adapter copies no weight"
    assert not any("lora" in key for key, _ in base.system.named_parameters())
    # Their pictures go on in turns; each is that of its adapter alone.
    pictures: dict[str, Picture] = {}
    for name, engine in engines.items():
        sample = Sample(id=name, task="text_to_image", text=PROMPT, size=engine.sampling.size)
        with torch.no_grad():
            pictures[name] = Picture(engine, Conditions(), sample, key(3, 0, 0), engine.settings(OPTIONS))
    while any(not picture.done for picture in pictures.values()):
        for name, engine in engines.items():
            if not pictures[name].done:
                advance(engine, [pictures[name]], Joined(), 8)
    for name in engines:
        wanted = alone(adapters / name if name else None)
        assert np.abs(levels(pictures[name].images()[-1]) - levels(wanted)).max() <= 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("style", "must be NAME=PATH"),
        ("a b=/", "must be NAME=PATH"),
        ("toy/other:style=/", "unknown model 'toy/other'"),
        ("style=/no/such/place", "is not there"),
        ("style=/no/such/place:0.5", "place is not there"),
        ("style=/tmp:half", "the scale after the colon is a number, not 'half'"),
    ],
)
def test_adapters_of_the_command_are_checked(given: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_adapters([given], ["toy/iomm", "toy/ovis-u1"])


def test_an_adapter_has_its_scale(adapters: Path) -> None:
    base = diptych.load("toy/iomm", device="cpu")
    text = f"{adapters / 'style'}:0.4"
    assert read_adapters([f"faint={text}"], ["toy/iomm"]) == {"toy/iomm": {"faint": text}}
    image, whole = (
        with_adapter(base, "faint", each).generate(PROMPT, seed=[3], **OPTIONS)[0] for each in (text, text[:-4])
    )
    wanted = diptych.load("toy/iomm", device="cpu", lora=text).generate(PROMPT, seed=[3], **OPTIONS)[0]
    assert np.abs(levels(image) - levels(wanted)).max() <= 1
    assert np.abs(levels(image) - levels(whole)).max() > 5


def test_several_go_by_one_name(adapters: Path) -> None:
    base = diptych.load("toy/iomm", device="cpu")
    given = [f"{adapters / 'style'}:0.4", f"{adapters / 'ink'}:0.3"]
    both = read_adapters([f"both={','.join(given)}"], ["toy/iomm"])["toy/iomm"]["both"]
    image = with_adapter(base, "both", both).generate(PROMPT, seed=[3], **OPTIONS)[0]
    wanted = diptych.load("toy/iomm", device="cpu", lora=given).generate(PROMPT, seed=[3], **OPTIONS)[0]
    assert np.abs(levels(image) - levels(wanted)).max() <= 1
    assert np.abs(levels(image) - levels(alone(adapters / "style"))).max() > 5
    with pytest.raises(UserError, match="an empty path is not there"):
        read_adapters([f"both={given[0]},"], ["toy/iomm"])


def test_adapters_of_the_command_go_to_their_models(tmp_path: Path) -> None:
    known = read_adapters([f"a={tmp_path}", f"toy/ovis-u1:a={tmp_path}"], ["toy/iomm", "toy/ovis-u1"])
    assert known == {"toy/iomm": {"a": str(tmp_path)}, "toy/ovis-u1": {"a": str(tmp_path)}}
    with pytest.raises(UserError, match="already"):
        read_adapters([f"a={tmp_path}", f"a={tmp_path}"], ["toy/iomm"])
    with pytest.raises(ApiError, match="not loaded by request"):
        Adapters().place("a")
