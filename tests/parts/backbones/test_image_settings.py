"""Settings of image processors in each of the files that transformers writes, read by every backbone that has them.

A processor of transformers 5 (tokenizer and image processor together) saves `processor_config.json` and no
`preprocessor_config.json`; image processors by themselves save the latter, as earlier versions did.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from transformers import (
    GotOcr2ImageProcessorPil,
    GotOcr2Processor,
    PreTrainedTokenizerFast,
    Qwen2VLImageProcessorPil,
)

from diptych.parts.backbones.internvl import InternVL
from diptych.parts.backbones.published import IMAGE_SETTINGS, PROCESSOR_SETTINGS, image_settings
from diptych.parts.backbones.qwen2_5_vl import Qwen2_5VL
from diptych.recipes.build import build_backbone
from diptych.recipes.names import locate
from diptych.recipes.recipe import Part

MEAN = (0.1, 0.2, 0.3)
PROCESSORS = {
    "qwen2_5_vl": Qwen2VLImageProcessorPil(
        size={"shortest_edge": 3136, "longest_edge": 200704}, patch_size=4, image_mean=MEAN
    ),
    "internvl": GotOcr2ImageProcessorPil(size={"height": 32, "width": 32}, image_mean=MEAN),
}
QWEN: dict[str, Any] = {
    "text_config": {
        "vocab_size": 520, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 256,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
    },
    "vision_config": {
        "depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 32, "patch_size": 4, "out_hidden_size": 16,
        "fullatt_block_indexes": [0], "window_size": 16,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, PreTrainedTokenizerFast]:
    plain, marked = (PreTrainedTokenizerFast.from_pretrained(str(locate("toy/mllm"))) for _ in range(2))
    marked.add_special_tokens({"additional_special_tokens": ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]})
    return {"internvl": plain, "qwen2_5_vl": marked}


@pytest.fixture(scope="module")
def models(tokenizers: dict[str, PreTrainedTokenizerFast]) -> dict[str, Any]:
    marked = tokenizers["qwen2_5_vl"]
    return {
        "qwen2_5_vl": Qwen2_5VL.from_config({**QWEN, "image_token_id": marked.get_vocab()["<|image_pad|>"]}, marked),
        "internvl": InternVL.from_pretrained(locate("toy/mllm")),
    }


def save(kind: str, form: str, folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """The settings as the installed transformers writes them."""
    folder.mkdir(parents=True, exist_ok=True)
    if form == PROCESSOR_SETTINGS:
        GotOcr2Processor(image_processor=PROCESSORS[kind], tokenizer=tokenizer).save_pretrained(folder)
    else:
        PROCESSORS[kind].save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    written = {IMAGE_SETTINGS, PROCESSOR_SETTINGS} & {path.name for path in folder.iterdir()}
    assert written == {form}, "the installed transformers writes this file and not the other"


@pytest.mark.parametrize("form", [IMAGE_SETTINGS, PROCESSOR_SETTINGS])
@pytest.mark.parametrize("kind", PROCESSORS)
def test_a_folder_of_either_form_is_read(
    kind: str, form: str, models: dict[str, Any], tokenizers: dict[str, PreTrainedTokenizerFast], tmp_path: Path
) -> None:
    models[kind].model.save_pretrained(tmp_path)
    save(kind, form, tmp_path, tokenizers[kind])
    settings = image_settings(tmp_path)
    assert settings is not None
    assert tuple(settings["image_mean"]) == MEAN
    read = type(models[kind]).from_pretrained(tmp_path)
    assert tuple(read.image_processor.image_mean) == MEAN
    if kind == "qwen2_5_vl":
        assert read.image_processor.size["longest_edge"] == 200704

    # A saved Diptych model has the same files beside its configuration.
    part = Part(kind=kind, config=models[kind].plain_config())
    built, _ = build_backbone(part, False, tmp_path)
    assert tuple(built.image_processor.image_mean) == MEAN  # type: ignore[attr-defined]


@pytest.mark.parametrize("form", [IMAGE_SETTINGS, PROCESSOR_SETTINGS])
def test_a_pipeline_keeps_them_in_the_folder_processor(
    form: str, models: dict[str, Any], tokenizers: dict[str, PreTrainedTokenizerFast], tmp_path: Path
) -> None:
    """As OmniGen2's release has them, beside `mllm`."""
    models["qwen2_5_vl"].model.save_pretrained(tmp_path / "mllm")
    save("qwen2_5_vl", form, tmp_path / "processor", tokenizers["qwen2_5_vl"])
    read = Qwen2_5VL.from_pretrained(tmp_path / "mllm")
    assert read.image_processor.size["longest_edge"] == 200704


def test_defaults_are_said(
    models: dict[str, Any],
    tokenizers: dict[str, PreTrainedTokenizerFast],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    models["qwen2_5_vl"].model.save_pretrained(tmp_path)
    tokenizers["qwen2_5_vl"].save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING):
        Qwen2_5VL.from_pretrained(tmp_path)
    assert f"{tmp_path}: no settings of an image processor" in caplog.text
