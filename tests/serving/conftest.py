"""One server process for the tests of the API, and the official client."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

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
