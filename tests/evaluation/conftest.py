"""A judge that replays replies over HTTP, tiny models of the real classes, and small benchmark data."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from shared import make_clip

Script = Callable[[str, int], dict[str, Any]]


class JudgeServer:
    """Chat completions on this machine. `script` gets a question's text and how often that question (with its
    pictures) came, and says `text`, and maybe `status`, `headers`, `finish`, `refusal` or `wait`."""

    def __init__(self) -> None:
        self.script: Script = lambda text, times: {"text": "yes"}
        self.asked: Counter[str] = Counter()
        self.answered = 0
        self._lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                content = body["messages"][0]["content"]
                name = hashlib.sha256(json.dumps(content).encode()).hexdigest()
                text = next(part["text"] for part in content if part["type"] == "text")
                with outer._lock:
                    outer.asked[name] += 1
                    times = outer.asked[name]
                said = outer.script(text, times)
                time.sleep(said.get("wait", 0))
                message = {"role": "assistant", "content": said.get("text"), "refusal": said.get("refusal")}
                choice = {"index": 0, "message": message, "finish_reason": said.get("finish", "stop")}
                data = json.dumps({"choices": [choice], "usage": {"total_tokens": 7}}).encode()
                try:
                    self.send_response(said.get("status", 200))
                    for key, value in said.get("headers", {}).items():
                        self.send_header(key, value)
                    self.send_header("Content-Length", str(len(data)))
                    self.end_headers()
                    self.wfile.write(data)
                except (BrokenPipeError, ConnectionResetError):
                    return
                with outer._lock:
                    outer.answered += 1

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"
        self._thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self._thread.join()


@pytest.fixture
def judge_server() -> Iterator[JudgeServer]:
    server = JudgeServer()
    yield server
    server.stop()


def published(path: Path) -> Any:
    """An entry of the download table that fits a file made here."""
    from diptych.evaluation.download import File

    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    return File(url=f"https://nowhere.invalid/{path.name}", sha256=sha256, licence="none")


@pytest.fixture
def bench_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, dict[str, str]], Path]:
    """Writes files of a benchmark into a data folder, and makes them the published ones."""
    from diptych.evaluation import download

    folder = tmp_path / "data"

    def write(task: str, files: dict[str, str]) -> Path:
        for name, text in files.items():
            (folder / task).mkdir(parents=True, exist_ok=True)
            (folder / task / name).write_text(text, encoding="utf-8")
        known = tuple(published(folder / task / name) for name in files)
        monkeypatch.setitem(download.FILES, task, known)
        return folder

    return write


@pytest.fixture(scope="session")
def tiny_eyes(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Folders of a Mask2Former and of a CLIP with random weights."""
    import torch
    from transformers import (
        Mask2FormerConfig,
        Mask2FormerForUniversalSegmentation,
        SwinConfig,
    )

    folder = tmp_path_factory.mktemp("eyes")
    torch.manual_seed(0)
    stages = ["stage1", "stage2", "stage3", "stage4"]
    ones = [1, 1, 1, 1]
    swin = SwinConfig(embed_dim=8, depths=ones, num_heads=ones, window_size=4, image_size=64, out_features=stages)
    detector = Mask2FormerConfig(
        backbone_config=swin,
        num_labels=80,
        hidden_dim=32,
        feature_size=32,
        mask_feature_size=32,
        dim_feedforward=16,
        encoder_feedforward_dim=16,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        num_queries=10,
    )
    model = Mask2FormerForUniversalSegmentation(detector)
    with torch.no_grad():  # random weights find nothing sharp; this makes some objects
        model.class_predictor.weight.mul_(60)
    model.save_pretrained(folder / "m2f")
    make_clip(folder / "clip")
    return str(folder / "m2f"), str(folder / "clip")
