"""Commands that are run with faults, and what is compared afterwards."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from diptych.core.locks import NAME as LOCK

HERE = Path(__file__).parent
TIMES = re.compile(r"seconds.*|date|commit|since|training_seconds|.*_seconds")
"""Values of JSON that differ between two runs of one command."""
DRAWN = (".html", ".svg", ".log", "table.md")
"""Files that hold times: they are only looked at for being there and whole."""


@dataclass(frozen=True, kw_only=True)
class Command:
    """argv: where {w} is the folder that it writes to. again: an option that goes on with, or replaces, what is there,
    by what the command says of it. env: environment variables."""

    name: str
    argv: tuple[str, ...]
    again: dict[str, str] = field(default_factory=dict[str, str])
    env: dict[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a command ended. code: negative for a signal. count: its file operations, 0 after a kill. orphans: whether
    processes that it started live on."""

    code: int
    count: int
    orphans: bool
    out: str
    err: str


def compiler() -> str | None:
    """The C compiler; None where there is none."""
    return os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")


def compiled(folder: Path) -> Path:
    """The layer, compiled."""
    library = folder / "interpose.so"
    command = compiler()
    assert command, "the fault suite needs a C compiler (cc)"
    source = str(HERE / "interpose.c")
    subprocess.run([command, "-shared", "-fPIC", "-O1", "-o", str(library), source, "-ldl"], check=True)
    return library


class Machine:
    """A worker below the layer, with a folder of its own."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder = folder
        library = compiled(folder)
        environment = {**os.environ, "LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        environment |= {"OPENBLAS_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        environment |= {"MPLCONFIGDIR": str(folder / "matplotlib"), "TMPDIR": str(folder)}
        environment |= {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "worker.py"), str(model)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=folder,
        )  # fmt: skip
        self.answer()

    def answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the worker has ended"
        return json.loads(line)

    def run(self, command: Command, *works: Path, extra: Sequence[str] = (), **fault: Any) -> list[Ended]:
        """Run the command once for each folder, at the same time; see `worker.start` for faults."""
        jobs = []
        for number, work in enumerate(works):
            argv = [word.format(w=work) for word in (*command.argv, *extra)]
            env = {name: value.format(w=work) for name, value in command.env.items()}
            log = str(self.folder / f"job-{number}")
            jobs.append({"argv": argv, "root": str(work), "cwd": str(self.folder), "log": log, "env": env, **fault})
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(jobs) + "\n")
        self.process.stdin.flush()
        return [Ended(**each) for each in self.answer()]

    def settle(self, command: Command, work: Path, **fault: Any) -> Ended:
        """Run the command as someone does who reads what it says, until it is done; a fault hits its last run."""
        [ended] = self.run(command, work, **({} if command.again else fault))
        if ended.code == 2:
            extra = [option for said, option in command.again.items() if said in ended.err]
            if extra:
                [ended] = self.run(command, work, extra=extra, **fault)
        return ended

    def close(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


def commands(folder: Path, model: Path, plain: Mapping[str, Any]) -> list[Command]:
    """The commands, at the smallest size, with their inputs in `folder`."""
    from PIL import Image

    recipe = json.loads(json.dumps(plain))
    recipe["run"] |= {"save_every": 1, "keep_checkpoints": 2, "sample_every": 2, "score_every": 3, "score_limit": 1}
    recipe["run"] |= {"score_tasks": ["toyeval"], "validate_every": 2}
    recipe |= {"sample_prompts": ["a red circle"]}
    recipe["stages"]["mix"] |= {"steps": 3, "batch_size": 2, "ema_decay": 0.5}
    recipe["stages"]["mix"]["data"]["held_out"] = 2
    train = folder / "train.yaml"
    train.write_text(yaml.safe_dump(recipe))
    short = json.loads(json.dumps(plain))
    short["stages"]["mix"] |= {"steps": 1, "batch_size": 2}
    quick = folder / "quick.yaml"
    quick.write_text(yaml.safe_dump(short))
    study = {"title": "Tiny", "tasks": {"toyeval": {"n": 1, "limit": 1, "steps": 1}}, "runs": {}, "seeds": [0]}
    study["runs"] = {"first": {"recipe": "quick.yaml"}, "second": {"recipe": "quick.yaml", "start": "first"}}
    (folder / "study.yaml").write_text(yaml.safe_dump(study))
    (folder / "photos").mkdir()
    for number in range(3):
        Image.new("RGB", (8 + number, 8)).save(folder / "photos" / f"{number}.png")
    stage = {**short["stages"]["mix"], "data": {"size": 32, "sources": {}}}
    stage["data"]["sources"] = {"mine": {"kind": "folder", "task": "image", "path": str(folder / "photos")}}
    prepared = folder / "prepare.yaml"
    prepared.write_text(yaml.safe_dump({**short, "stages": {"mix": stage}}))
    working = {**short, "run": {**short["run"], "num_workers": 2, "save_every": 1}}
    workers = folder / "workers.yaml"
    workers.write_text(yaml.safe_dump({**working, "stages": {"mix": {**stage, "steps": 4}}}))
    scores = ("eval", str(model), "--tasks", "toyeval,toyvqa", "--n", "1", "--limit", "2", "--steps", "1")
    start = ("quickstart", "--model", str(model), "--recipe", str(quick), "--limit", "1", "--out", "{w}/quick")
    return [
        Command(name="train", argv=("train", str(train), "--out", "{w}/run"), again={"--resume": "--resume"}),
        Command(
            name="workers",
            argv=("train", str(workers), "--out", "{w}/run"),
            again={"--resume": "--resume"},
            env={"DIPTYCH_INDEX": "{w}/index"},
        ),
        Command(name="eval", argv=(*scores, "--output", "{w}/scores")),
        Command(name="study", argv=("study", str(folder / "study.yaml"), "--no-estimate", "--out", "{w}/study")),
        Command(name="save", argv=("save", str(model), "{w}/saved")),
        Command(name="quickstart", argv=start, again={"--force": "--force"}),
        Command(
            name="prepare",
            argv=("prepare", str(prepared), "--output", "{w}/prepared", "--shard-items", "2", "--device", "cpu"),
            env={"DIPTYCH_INDEX": "{w}/index"},
        ),
        Command(name="index", argv=("index", str(folder / "photos")), env={"DIPTYCH_INDEX": "{w}/index"}),
    ]


def differences(work: Path, expected: Path) -> list[str]:
    """Where what a command left differs from what it leaves undisturbed: names, weights, results, pictures.

    The lock of a folder may outlast its writer: it holds nobody up.
    """
    here, there = files(work), files(expected)
    found = [f"missing {name}" for name in sorted(there - here)] + [
        f"left behind {name}" for name in sorted(here - there)
    ]
    return found + [
        f"differs: {name}" for name in sorted(here & there) if content(work, name) != content(expected, name)
    ]


def files(folder: Path) -> set[str]:
    """Names of files, hidden ones and folders without a file included."""
    there = [path for path in folder.rglob("*") if path.name != LOCK]
    return {str(path.relative_to(folder)) for path in there if not path.is_dir() or not any(path.iterdir())}


def content(folder: Path, name: str) -> Any:
    """What is compared of a file."""
    path = folder / name
    if path.is_dir():
        return None
    data = path.read_bytes()
    if name.endswith(DRAWN):
        return bool(data) and (path.suffix != ".html" or data.rstrip().endswith(b"</html>"))
    if path.suffix not in (".json", ".jsonl") or name.endswith((".index.json", "tokenizer.json")):
        return data
    text = data.decode()
    return [timeless(json.loads(line)) for line in ([text] if path.suffix == ".json" else text.splitlines())]


def timeless(value: Any) -> Any:
    """Plain values without times."""
    if isinstance(value, dict):
        return {name: timeless(inner) for name, inner in value.items() if not TIMES.fullmatch(name)}
    return [timeless(inner) for inner in value] if isinstance(value, list) else value
