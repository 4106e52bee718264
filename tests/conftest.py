"""Tiny models with random weights, made once for all tests that need a whole system."""

from __future__ import annotations

import copy
import gc
import os
import sys
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from diptych.parts.backbones.internvl import InternVL
from diptych.parts.backbones.toy_tokenizer import train_tokenizer
from diptych.recipes.build import build_system
from diptych.recipes.recipe import parse
from diptych.recipes.run import save_model

# One thread each, here and in processes that tests start: sums are then added in one order, and workers do not crowd.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

sys.path.insert(0, str(Path(__file__).parent))  # `sgt_golden`, which tests of several rooms read

from shared import made_once  # noqa: E402


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Whether a file has no slow test where these alone are asked for: it need not be imported then."""
    slow_alone = str(config.getoption("markexpr")).startswith("slow")
    test = collection_path.name.startswith("test_") and collection_path.suffix == ".py"
    return True if slow_alone and test and "mark.slow" not in collection_path.read_text(encoding="utf-8") else None


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Collect tests without looking for what can be freed, a fifth of the time: what is imported stays to the end."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.collect()
        gc.freeze()
        gc.enable()


@pytest.fixture(scope="session", autouse=True)
def _index_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Indexes of the tests' data go to a folder of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIPTYCH_INDEX", str(tmp_path_factory.mktemp("index")))
        yield


BACKBONE: dict[str, Any] = {
    "vision_config": {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "image_size": 32,
        "patch_size": 8,
    },
    "text_config": {
        "model_type": "qwen2",
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 64,
        "vocab_size": 320,
        "max_position_embeddings": 192,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": 2,
        "tie_word_embeddings": True,
    },
    "image_token_id": 5,
    "image_seq_length": 4,
    "downsample_ratio": 0.5,
}
TEXTS = ["a red circle left of a blue square", "how many crosses are there?", "Generate an image", "yes no two"] * 4
SAMPLING: dict[str, Any] = {"size": [32, 32], "steps": 2, "cfg": 2.0, "batch_size": 64}
DECODER: dict[str, Any] = {
    "channels": 3,
    "patch": 8,
    "hidden": 32,
    "heads": 2,
    "double": 1,
    "single": 1,
    "mlp_ratio": 2,
    "axes": [4, 6, 6],
}


@pytest.fixture(scope="session")
def tiny_mllm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A backbone in its published layout."""

    def make(folder: Path) -> None:
        (folder / "mllm").mkdir()
        torch.manual_seed(0)
        InternVL.from_config(BACKBONE, train_tokenizer(TEXTS, 320)).save_pretrained(folder / "mllm")

    return made_once(tmp_path_factory, "mllm", make) / "mllm"


@pytest.fixture(scope="session")
def _tiny_plain(tiny_mllm: Path) -> dict[str, Any]:
    return {
        "seed": 1,
        "system": {
            "kind": "composed",
            "flow": {"prediction": "data"},
            "backbone": {"kind": "internvl", "weights": str(tiny_mllm)},
            "conditioner": {"kind": "metaquery", "config": {"queries": 4}},
            "decoder": {"kind": "mmdit", "config": DECODER},
            "autoencoder": {"kind": "pixel"},
        },
        "sampling": SAMPLING,
        "run": {"log_every": 1, "save_every": 0, "validate_every": 0, "device": "cpu", "tensorboard": False},
        "stages": {
            "mix": {
                "train": ["queries", "decoder"],
                "steps": 3,
                "batch_size": 4,
                "data": {
                    "size": 32,
                    "sources": {
                        "pictures": {"kind": "toyworld", "task": "image", "count": 16},
                        "pairs": {"kind": "toyworld", "task": "text_to_image", "count": 16, "seed": 2},
                    },
                },
            }
        },
    }


@pytest.fixture
def tiny_plain(_tiny_plain: dict[str, Any]) -> dict[str, Any]:
    """A recipe that trains the tiny system for three steps, as plain values to change at will."""
    return copy.deepcopy(_tiny_plain)


@pytest.fixture
def tiny_recipe(tiny_plain: dict[str, Any], tmp_path: Path) -> Path:
    """The same as a file."""
    path = tmp_path / "tiny.yaml"
    path.write_text("# A tiny recipe.\n# not run\n" + yaml.safe_dump(tiny_plain, sort_keys=False))
    return path


@pytest.fixture(scope="session")
def tiny_model(_tiny_plain: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole tiny system in save_pretrained layout; nothing refers to another folder."""

    def make(folder: Path) -> None:
        recipe = parse(_tiny_plain)
        torch.manual_seed(0)
        system = build_system(recipe.system)
        for parameter in system.named_parts()["decoder"].parameters():  # its last layer starts at zero
            torch.nn.init.normal_(parameter, std=0.2)
        system.mark_trained(system.named_parts())
        save_model(system, recipe, folder / "model")

    return made_once(tmp_path_factory, "tiny", make) / "model"


@pytest.fixture
def distilling_plain(tiny_plain: dict[str, Any], tiny_model: Path) -> dict[str, Any]:
    """A recipe in which adapters on the tiny model learn in three steps what it draws in two, guided."""
    plain = tiny_plain
    plain["start"] = str(tiny_model)
    plain["system"]["decoder"]["lora"] = {"rank": 2, "alpha": 2, "targets": ["qkv", "up"]}
    plain["sampling"] = {"size": [32, 32], "steps": 1, "cfg": 1.0}
    plain["run"] |= {"validate_every": 1}
    [stage] = plain.pop("stages").values()
    sources = {
        "pairs": {"kind": "toyworld", "task": "text_to_image", "count": 16, "seed": 2},
        "edits": {"kind": "toyworld", "task": "edit", "count": 16, "seed": 3},
    }
    distill = {"kind": "distill", "train": ["lora"], "optimizer": {"lr": 1e-2}, "ema_decay": 0.9}
    plain["stages"] = {"distill": {**stage, **distill, "data": {"size": 32, "held_out": 2, "sources": sources}}}
    return plain
