"""Two processes against one: the same samples, losses and weights, whole (DDP) or sharded (FSDP2)."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from diptych.core.errors import UserError
from diptych.recipes.recipe import parse
from diptych.recipes.run import make_accelerator, train_recipe
from diptych.training.config import RunConfig
from diptych.training.metrics import read_metrics
from diptych.training.state import Stored
from shared import made_once

KINDS = {"auto": "muon", "fsdp": "adamw"}
LAST = "checkpoints/step-00000007"


def two_stages(plain: dict[str, Any], strategy: str) -> dict[str, Any]:
    plain = copy.deepcopy(plain)
    optimizer = {"kind": KINDS[strategy], "lr": 1e-3}
    stage = plain["stages"].pop("mix") | {"ema_decay": 0.5, "micro_batch_size": 1, "optimizer": optimizer}
    stage["data"]["held_out"] = 2
    plain["stages"] = {"first": {**stage, "steps": 4}, "second": {**stage, "train": ["decoder"], "steps": 3}}
    plain["run"] |= {"validate_every": 3, "save_every": 2, "keep_checkpoints": 9, "strategy": strategy}
    return plain


def all_tasks(tokenizer: Path) -> dict[str, Any]:
    """An Ovis-U1 that learns all its tasks at once, one sample a pass: most passes differ between processes."""
    source = {"kind": "toyworld", "count": 64}
    tasks = {"understand": 0.5, "text_to_image": 0.3, "edit": 0.2}
    llm = {"model_type": "qwen3", "vocab_size": 320, "hidden_size": 24, "intermediate_size": 32, "head_dim": 12}
    llm |= {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 512}
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = {"visual_vocab_size": 20, "max_length": 512, "preface": "", "min_pixels": 1024, "max_pixels": 1024}
    config |= {"llm": {**llm, "tie_word_embeddings": False}, "vision": {**vision, "image_size": 32, "patch_size": 8}}
    decoder = {"channels": 3, "patch": 8, "hidden": 32, "heads": 2, "double": 1, "single": 1, "axes": [4, 6, 6]}
    stage = {
        "train": ["vision", "head", "adapter", "llm", "refiner", "decoder"],
        "steps": 3,
        "batch_size": 8,
        "micro_batch_size": 1,
        "optimizer": {"lr": 1e-3},
        "data": {
            "size": 32,
            "sources": {task: {**source, "task": task, "weight": share} for task, share in tasks.items()},
        },
    }
    return {
        "seed": 1,
        "system": {
            "kind": "ovis_u1",
            "blank": False,
            "canvas": 8,
            "canvas_pixels": [64, 1024],
            "read_pixels": None,
            "backbone": {"kind": "ovis", "tokenizer": str(tokenizer), "config": config},
            "refiner": {"kind": "token_refiner"},
            "decoder": {"kind": "ovis_u1", "config": decoder},
            "autoencoder": {"kind": "pixel"},
        },
        "sampling": {"size": [32, 32], "steps": 2},
        "run": {"log_every": 1, "save_every": 0, "validate_every": 0, "device": "cpu", "tensorboard": False},
        "stages": {"all": stage},
    }


@pytest.fixture(scope="module")
def together(_tiny_plain: dict[str, Any], tiny_mllm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both strategies under torchrun with two processes on the CPU; the sharded run also continued."""

    def make(folder: Path) -> None:
        mixed = all_tasks(tiny_mllm)
        mixed["run"]["strategy"] = "fsdp"
        (folder / "all_tasks.yaml").write_text(yaml.safe_dump(mixed, sort_keys=False))
        for strategy in KINDS:
            plain = two_stages(_tiny_plain, strategy)
            plain["run"]["device"] = "auto"  # there is no GPU to be seen
            (folder / f"{strategy}.yaml").write_text(yaml.safe_dump(plain, sort_keys=False))
        script = Path(__file__).with_name("two_processes.py")
        done = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script, folder],
            env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            capture_output=True,
            text=True,
            timeout=900,
        )
        assert done.returncode == 0, done.stderr

    return made_once(tmp_path_factory, "parallel", make)


def tensors(run: Path, file: str) -> dict[str, torch.Tensor]:
    """Of a file of a run, or of a kind of its last checkpoint, however many processes wrote it."""
    if file.endswith(".safetensors"):
        return load_file(run / file)
    stored = Stored(run / LAST, file)
    return {name: stored.read(name) for name in stored.chunks}


@pytest.mark.slow
@pytest.mark.parametrize("strategy", KINDS)
def test_two_processes_are_one(strategy: str, together: Path, tiny_plain: dict[str, Any], tmp_path: Path) -> None:
    plain = two_stages(tiny_plain, strategy)
    plain["run"]["strategy"] = "auto"
    assert train_recipe(parse(plain), plain, tmp_path / "one")
    alone, both = (read_metrics(folder / "metrics.jsonl") for folder in (tmp_path / "one", together / strategy))
    assert [(row.pop("stage"), sorted(row)) for row in alone] == [(row.pop("stage"), sorted(row)) for row in both]
    for one, two in zip(alone, both, strict=True):
        assert one == pytest.approx(two, rel=1e-3)
    for file in ("model/model.safetensors", "trained"):
        one, two = tensors(tmp_path / "one", file), tensors(together / strategy, file)
        assert one.keys() == two.keys()
        apart = torch.cat([(one[name].float() - two[name].float()).flatten() for name in one])
        assert apart.square().mean().sqrt() < 1e-4, file  # both optimisers blow up rounding where gradients vanish


@pytest.mark.slow
def test_tasks_mixed_within_a_step_are_sharded_too(together: Path, tiny_mllm: Path, tmp_path: Path) -> None:
    """Passes of two processes that see different tasks, some without images: the losses and weights of one process."""
    plain = all_tasks(tiny_mllm)
    assert train_recipe(parse(plain), plain, tmp_path / "one")
    alone, both = (read_metrics(folder / "metrics.jsonl") for folder in (tmp_path / "one", together / "all_tasks"))
    assert all(
        {"loss/cross_entropy.understand", "loss/flow.edit", "loss/flow.text_to_image"} <= set(row) for row in alone
    )
    for one, two in zip(alone, both, strict=True):
        assert one.pop("stage") == two.pop("stage")
        assert one == pytest.approx(two, rel=1e-3)
    one, two = (
        load_file(folder / "model" / "model.safetensors") for folder in (tmp_path / "one", together / "all_tasks")
    )
    assert one.keys() == two.keys()
    apart = torch.cat([(one[name].float() - two[name].float()).flatten() for name in one])
    assert apart.square().mean().sqrt() < 1e-4


@pytest.mark.slow
def test_a_sharded_run_goes_on(together: Path) -> None:
    whole, resumed = together / "fsdp", together / "fsdp-continued"
    assert read_metrics(whole / "metrics.jsonl") == read_metrics(resumed / "metrics.jsonl")
    for file in ("model/model.safetensors", "trained", "optimizer"):
        one, two = tensors(whole, file), tensors(resumed, file)
        assert one.keys() == two.keys()
        assert all(torch.equal(one[name], two[name]) for name in one), file


def test_sharding_alone_is_refused(tiny_plain: dict[str, Any], tmp_path: Path) -> None:
    tiny_plain["run"]["strategy"] = "fsdp"
    with pytest.raises(UserError, match="start with torchrun --nproc-per-node"):
        train_recipe(parse(tiny_plain), tiny_plain, tmp_path / "run")


@pytest.mark.parametrize(
    ("rank", "local", "message"),
    [
        ("0", None, "WORLD_SIZE is 2 and LOCAL_RANK is not set; start processes with torchrun"),
        (None, "0", "WORLD_SIZE is 2 and RANK is not set"),
        ("0", "2", "WORLD_SIZE is 2 and LOCAL_RANK is 2, which is not below it"),
        ("0", "0", "WORLD_SIZE is 2 without MASTER_ADDR and MASTER_PORT"),
    ],
)
def test_processes_that_would_train_alone_are_refused(
    rank: str | None, local: str | None, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable, value in {"RANK": rank, "LOCAL_RANK": local, "MASTER_ADDR": None, "MASTER_PORT": None}.items():
        monkeypatch.delenv(variable, raising=False)
        if value is not None:
            monkeypatch.setenv(variable, value)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=message):
        make_accelerator(RunConfig())


def test_sharded_runs_draw_no_pictures(tiny_plain: dict[str, Any]) -> None:
    tiny_plain["run"] |= {"strategy": "fsdp", "sample_every": 5}
    with pytest.raises(UserError, match="sample_every must be 0"):
        parse(tiny_plain)
