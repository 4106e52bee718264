"""Packed rows of the released SGT code, and how its settings read images."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from bagel_system import build, picture
from PIL import Image
from torch import Tensor

from diptych.core.draws import Draws
from diptych.core.errors import UserError
from diptych.core.image_sizes import SideRange
from diptych.core.packing import pack_mask
from diptych.core.patchify import patchify
from diptych.core.sample import Batch, Message, Sample
from diptych.data.imaging import to_tensor
from diptych.inference.engine import Engine
from diptych.inference.sampling import Sampling
from diptych.systems.bagel.config import BagelConfig
from diptych.systems.bagel.examples import encode_by_shape, resize, vision_size
from diptych.systems.bagel.items import Item, Latent, Markers, Pack, Tables, Text, Vision, pack
from diptych.systems.bagel.system import BagelSystem
from sgt_golden import arrays, facts

FACTS, GOLDEN = facts("packing"), arrays("packing")
MARKERS = Markers(**FACTS["markers"])
TABLES = Tables(latent=64, vision=70)
RELEASED = {
    "vision_size": SideRange(longest=980, shortest=378, area=2_007_040, root=True),
    "vision_size_edit": SideRange(longest=224, shortest=224, root=True),
    "reference_latents": False,
}


def items(sample: dict[str, Any], draws: list[float]) -> list[Item]:
    """What our reader makes of such a sample."""
    if sample["kind"] == "proxy":
        rows, columns = sample["vision"]
        text = Text(ids=tuple(sample["text"]), drop=draws[0] < 0.1)
        tall, wide = sample["target"]
        return [Vision(rows=rows, columns=columns), text, Latent(rows=tall, columns=wide, noised=True)]
    found: list[Item] = []
    for kind, content in sample["parts"]:
        if kind == "image":
            found.append(Vision(rows=content[0], columns=content[1]))
        else:
            found.append(Text(ids=tuple(content), learned=kind == "gpt"))
    return found


def packed(row: dict[str, Any]) -> Pack:
    draws = row["text_drop_draws"]
    return pack([items(sample, drawn) for sample, drawn in zip(row["samples"], draws, strict=True)], MARKERS, TABLES)


@pytest.mark.parametrize("row", FACTS["rows"], ids=lambda row: row["name"])
def test_rows_are_packed_as_the_release_does(row: dict[str, Any]) -> None:
    got = packed(row)
    assert got.length == row["length"]
    prefix = f"{row['name']}."
    expected = {k.removeprefix(prefix): torch.from_numpy(v) for k, v in GOLDEN.items() if k.startswith(prefix)}
    values: dict[str, Tensor] = {
        "text_ids": got.text_ids, "text_places": got.text_places, "positions": got.positions,
        "vision_places": got.vision_places, "vision_ids": got.vision_ids,
        "vision_lengths": torch.tensor(got.vision_lengths), "latent_places": got.latent_places,
        "latent_ids": got.latent_ids, "flow_places": got.flow_places, "learned_places": got.learned_places,
        "labels": got.labels, "label_weights": got.label_weights,
    }  # fmt: skip
    for name, value in expected.items():
        if name in values:
            torch.testing.assert_close(values[name].to(value.dtype), value, rtol=1e-6, atol=1e-7, msg=name)
    if "times" in expected:  # one a target, repeated over its tokens
        counts = [rows * columns for rows, columns in got.latent_grids]
        starts = [sum(counts[:number]) for number in range(len(counts))]
        raw = expected["times"][starts]
        torch.testing.assert_close(got.token_times(raw.sigmoid()).logit(), expected["times"], rtol=1e-5, atol=1e-6)
        assert [list(grid) for grid in got.latent_grids] == row["latent_grids"]
    masks = got.mask()
    start = 0
    for number, length in enumerate(got.samples):
        if f"sees.{number}" in expected:
            assert torch.equal(masks[start : start + length, start : start + length], expected[f"sees.{number}"])
        start += length
    if "sees" in expected:  # padded, the padding being a causal sample of its own
        rest = row["samples_lengths"][-1]
        modes = [("causal", "full", "noise").index(mode) for mode in row["modes"]]
        assert list(got.splits) == row["splits"][:-1]
        assert [int(mode) for mode in got.modes] == modes[:-1]
        whole = pack_mask((*got.samples, rest), (*got.splits, rest), (*got.modes, modes[-1]))
        assert torch.equal(whole, expected["sees"])


def test_patches_of_the_tower_are_the_releases() -> None:
    transforms, case = arrays("transforms"), facts("transforms")["patches"]
    pixels = torch.from_numpy(transforms[case["of"]])
    torch.testing.assert_close(
        patchify(pixels[None], case["patch"], "pqc")[0], torch.from_numpy(transforms[case["key"]])
    )


@pytest.mark.parametrize("case", facts("transforms")["pixels"], ids=lambda case: case["key"])
def test_images_are_resized_as_the_release_does(case: dict[str, Any]) -> None:
    transforms = arrays("transforms")
    image = to_tensor(Image.fromarray(transforms[case["input"]]))
    size = SideRange(longest=case["longest"], shortest=case["shortest"]).fit(*image.shape[1:], case["stride"])
    np.testing.assert_allclose(resize(image, size), transforms[case["key"]], atol=1e-6)


@pytest.fixture
def system() -> BagelSystem:
    return build().eval()


def edit(height: int, width: int, text: str = "color the parts") -> Sample:
    seen = to_tensor(Image.new("RGB", (width, height), (10, 200, 90)))
    return Sample(id="p", task="edit", text=text, image=picture(1), context_images=(seen,))


def test_a_proxy_is_seen_small_and_without_latents(system: BagelSystem) -> None:
    """Sizes by task: one where an image is drawn, one of conversations; no clean latents, and no slot for them."""
    reader = system.reader
    settings = dataclasses.replace(
        system.settings,
        reference_latents=False,
        vision_size=SideRange(longest=64, shortest=32),
        vision_size_edit=SideRange(longest=16, shortest=16),
    )
    proxy = reader.example(edit(48, 32), settings, Draws([1]))
    assert [type(item) for item in proxy.items] == [Vision, Text, Latent]
    assert (proxy.items[0].rows, proxy.items[0].columns) == (2, 1)  # type: ignore[union-attr]
    told = (Message(role="user", text="<image>what?"), Message(role="assistant", text="two"))
    asked = Sample(id="q", task="understand", messages=told, context_images=edit(48, 32).context_images)
    conversation = reader.example(asked, settings, Draws([1]))
    assert (conversation.items[0].rows, conversation.items[0].columns) == (6, 4)  # type: ignore[union-attr]


def test_released_sizes() -> None:
    config = BagelConfig(**RELEASED)  # type: ignore[arg-type]
    sizes = facts("transforms")["sizes"]
    for draw, name in ((True, "proxy_vision"), (False, "conversation_vision")):
        for width, height, images, wide, tall, _ in sizes[name]:
            assert vision_size(config, draw).fit(height, width, 14, images) == (tall, wide)


def test_an_edits_image_is_brought_to_the_autoencoders_size_before_the_tower(system: BagelSystem) -> None:
    """The released inferencer: 300x200 is 768x512 to the autoencoder, and 2,035 tokens to the tower."""
    reader, calls = system.reader, []
    reader.network = dataclasses.replace(
        reader.network, vision=dataclasses.replace(reader.network.vision, patch_size=14), latent_patch=2
    )
    reader.image_step = 16
    settings = dataclasses.replace(
        system.settings,
        vision_size=SideRange(longest=980, shortest=224),
        latent_size=SideRange(longest=1024, shortest=512),
        sample_tokens=16_384,
        row_tokens=16_384,
    )

    def encode(images: Tensor) -> Tensor:
        calls.append(tuple(images.shape))
        return torch.zeros(len(images), 16, images.shape[2] // 8, images.shape[3] // 8)

    parts = reader.request(edit(200, 300))
    [pieces] = reader.pieces([parts], settings, draw=True, where=["p"], encode=encode)
    assert calls == [(1, 3, 512, 768)]
    assert [piece.item.cost - 2 for piece in pieces[:2]] == [32 * 48, 2035]
    released = dataclasses.replace(
        settings, reference_latents=False, vision_size_edit=SideRange(longest=224, shortest=224)
    )
    [same] = reader.pieces([parts], released, draw=True, where=["p"], encode=encode)
    assert [piece.item for piece in same] == [piece.item for piece in pieces], "settings of training alone"
    [asked] = reader.pieces([parts], settings, draw=False, where=["p"], encode=encode)
    assert asked[0].item.cost - 2 == 16 * 24, "a question's image goes to the tower from its own size (336x224)"
    system.settings = settings
    step = dataclasses.replace(system.network.config, latent_patch=16)
    system.network.config = step
    assert system.edit_size(200, 300) == (512, 768)


def test_edits_have_the_shape_of_their_image_and_a_given_size_wins(system: BagelSystem) -> None:
    system.settings = dataclasses.replace(system.settings, latent_size=SideRange(longest=32, shortest=16))
    engine = Engine(system, Sampling(size=(16, 16), steps=1, cfg=1.0))
    wide = Image.new("RGB", (24, 16))
    assert engine.edit(wide, "make it blue")[0].size == (24, 16)
    assert engine.edit(wide, "make it blue", size=(16, 16))[0].size == (16, 16)


def test_placeholders_and_images_agree_in_every_branch(system: BagelSystem) -> None:
    sample = Sample(id="x", task="edit", text="put <image> on <image> now", context_images=(picture(1), picture(2)))
    batch = Batch((sample,))
    reader = system.reader
    full = reader.request(sample)
    assert [isinstance(part, str) for part in full] == [True, False, True, False, True]
    texts = reader.request(system.without(batch, "images").samples[0])
    assert texts == [part for part in full if isinstance(part, str)], "the same texts, each still one of its own"
    images = reader.request(system.without(batch, "text").samples[0])
    assert [isinstance(part, str) for part in images] == [False, False]
    assert reader.request(system.without(batch, "text_and_images").samples[0]) == []
    engine = Engine(system, Sampling(size=(16, 16), steps=2, cfg=3.0, guidance={"kind": "bagel"}))
    made = engine.tensors([sample], n=1, seed=0, image_cfg=1.5)
    assert made[0].isfinite().all()
    with pytest.raises(UserError, match="1 <image> placeholders but 0 images"):
        engine.generate("a circle like <image>")


def test_images_are_encoded_in_batches_by_shape() -> None:
    calls: list[tuple[int, ...]] = []

    def encode(images: Tensor) -> Tensor:
        calls.append(tuple(images.shape))
        return images.mean((2, 3), keepdim=True)

    images = [picture(1), picture(2, 24), picture(3), picture(4, 24), picture(5)]
    latents = encode_by_shape(images, encode)
    assert calls == [(3, 3, 16, 16), (2, 3, 24, 24)]
    for image, latent in zip(images, latents, strict=True):
        torch.testing.assert_close(latent, image.mean((1, 2), keepdim=True))
    large = torch.zeros(3, 2048, 2048)
    calls.clear()
    encode_by_shape([large, large], encode)
    assert calls == [(1, 3, 2048, 2048)] * 2, "as many at once as fit the pixels that are allowed"
