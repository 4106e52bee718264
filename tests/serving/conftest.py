"""One server process for the tests of the API, and the official client."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import diptych
from diptych.parts.added_lora import Factors
from diptych.parts.lora import linear_layers
from diptych.recipes import lora
from serving.asking import PROMPT
from serving_process import Running, ended, started


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """toy/iomm and toy/ovis-u1, served."""
    log = tmp_path_factory.mktemp("server") / "log.txt"
    made = started(
        log, "toy/iomm", "toy/ovis-u1", "--read-timeout", "3", "--max-body", "4", "--rows", "12", interpreter=True
    )
    yield made
    ended(made)


@pytest.fixture(scope="session")
def client(server: Running) -> Iterator[Any]:
    openai = pytest.importorskip("openai")
    made = openai.OpenAI(base_url=f"{server.address}/v1", api_key="none", max_retries=0, timeout=120)
    yield made
    made.close()


@pytest.fixture(scope="session")
def drawn() -> Image.Image:
    return diptych.load("toy/iomm", device="cpu").generate(PROMPT, seed=[7])[0]


def write_adapter(folder: Path, seed: int) -> Path:
    """Random LoRA of toy/iomm's decoder, in PEFT's layout."""
    system = diptych.load("toy/iomm", device="cpu").system
    generator = torch.Generator().manual_seed(seed)
    updates = {
        name: Factors(
            down=torch.randn(2, layer.in_features, generator=generator) * 0.5,
            up=torch.randn(layer.out_features, 2, generator=generator) * 0.5,
            alpha=2.0,
        )
        for name, layer in linear_layers(lora.homes(system)["decoder"]).items()
        if "qkv" in name
    }
    lora.write(system, {"decoder": updates}, folder, "peft")
    return folder


@pytest.fixture(scope="session")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the adapters style and ink, and a link that leads out of it."""
    top = tmp_path_factory.mktemp("adapters")
    folder = top / "shown"
    folder.mkdir()
    for seed, name in enumerate(("style", "ink")):
        write_adapter(folder / name, seed)
    (top / "elsewhere").mkdir()
    (folder / "link").symlink_to(top / "elsewhere")
    return folder


@pytest.fixture(scope="session")
def locked(tmp_path_factory: pytest.TempPathFactory, adapters: Path) -> Iterator[Running]:
    """A server with a key, adapters, one row, a short queue, two models of which one is kept, and no cache."""
    log = tmp_path_factory.mktemp("locked") / "log.txt"
    made = started(
        log, "toy/iomm", "toy/mllm", "--keep", "1", "--rows", "1", "--queue", "1", "--no-cache", "--cors",
        "https://page.example", "--host", "0.0.0.0", "--adapter", f"style={adapters / 'style'}", "--adapters",
        str(adapters), "--no-tools", DIPTYCH_API_KEY="correct-horse", TMPDIR=str(log.parent),
    )  # fmt: skip
    made.address = f"http://127.0.0.1:{made.port}"
    yield made
    ended(made)
