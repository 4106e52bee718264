"""Benchmark data: fetched from their publishers on first use, checked, and never part of this package."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from diptych.checkpoints.tensors import atomic_text
from diptych.core.errors import UserError, unknown

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class File:
    """A published file: where it is, what it must hash to (None where the publisher says nothing), and its licence.

    md5: in place of a SHA-256, where that is what the publisher gives.
    """

    url: str
    sha256: str | None
    licence: str
    md5: str | None = None

    @property
    def name(self) -> str:
        return self.url.rsplit("/", 1)[-1]


def _github(repository: str, revision: str, path: str, sha256: str | None, licence: str) -> File:
    url = f"https://raw.githubusercontent.com/{repository}/{revision}/{path}"
    return File(url=url, sha256=sha256, licence=licence)


def _hub(dataset: str, path: str, licence: str) -> File:
    return File(url=f"https://huggingface.co/datasets/{dataset}/resolve/main/{path}", sha256=None, licence=licence)


_WISE = ("PKU-YuanGroup/WISE", "eb51174483a5de2e34e8614cf9dfb3319ee7fcd0")
_IMGEDIT = ("PKU-YuanGroup/ImgEdit", "547185d12c08267a862b94248576e1746e479937")
_ELLA = ("TencentQQGYLab/ELLA", "3c228f1dc6c4d3cad0a47493816151a419f14db3")
STATED = "see the publisher's repository"
FILES: dict[str, tuple[File, ...]] = {
    "geneval": (
        _github(
            "djghosh13/geneval",
            "af4902f24d3ca90ebbb446dd9891a59e0f82725f",
            "prompts/evaluation_metadata.jsonl",
            "5c48e0813e812e3c373fa5c8ed07a8f0a483be30272b4427b0559c8048e67c13",
            "MIT",
        ),
    ),
    "dpg": (_github(*_ELLA, "dpg_bench/dpg_bench.csv", None, STATED),),
    "wise_legacy": tuple(
        _github(*_WISE, f"WISE_legacy/data/{name}.json", sha256, STATED)
        for name, sha256 in (
            ("cultural_common_sense", "7a59216c768698280cea37caa574b52f3faf054d73b398b9bb6b3161baf8e3aa"),
            ("spatio-temporal_reasoning", "e27d797885ad86e64d857d0cc93d33e04be572a8dcae95692a2c7e7876233f9a"),
            ("natural_science", "b262fae58e413c7a4bd3c3d5a089f8c6529feac227e4b6606be261a949035544"),
        )
    ),
    "wise_verified": tuple(
        _github(*_WISE, f"data_verified/{name}_verified.json", sha256, STATED)
        for name, sha256 in (
            ("cultural_common_sense", "23482925266e2784b2ba24b75239fdc6691bf85ae253d2c4aa38b71b45fefa89"),
            ("spatio-temporal_reasoning", "42c0b9d829365e392c2d4af283850dc76b1f922ab0c79198366de4f306eaf2b6"),
            ("natural_science", "6f346c336f16f611e5c73e0fcacdccb336c200d534cf111526b22d50ea912555"),
        )
    ),
    "imgedit": (
        _github(
            *_IMGEDIT,
            "Benchmark/Basic/basic_edit.json",
            "5ee9b7d61e918692416f79896300f738598c83adff8de737b25be4aaff72dc69",
            STATED,
        ),
        _github(
            *_IMGEDIT,
            "Benchmark/Basic/prompts.json",
            "f9468dc848776ee0a6c2e2c31e678c7224e9cb61b013747c8c52d4a05627b5a0",
            STATED,
        ),
        _hub("sysuyy/ImgEdit", "Benchmark.tar", STATED),
    ),
    "mjhq_fid": (
        _hub("playgroundai/MJHQ-30K", "meta_data.json", STATED),
        _hub("playgroundai/MJHQ-30K", "mjhq30k_imgs.zip", STATED),
    ),
    "clipscore": (
        File(
            url="https://raw.githubusercontent.com/openai/dalle3-eval-samples/main/prompts/8k_coco.txt",
            sha256=None,
            licence=STATED,
        ),
    ),
}


def default_folder() -> Path:
    """Where downloads are kept: $DIPTYCH_DATA, or diptych/benchmarks in the user's cache."""
    given = os.environ.get("DIPTYCH_DATA")
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
    return Path(given).expanduser() if given else cache / "diptych" / "benchmarks"


@dataclass(frozen=True, kw_only=True)
class Data:
    """Where benchmark files are looked for.

    folder: holds GENEVAL/evaluation_metadata.jsonl and so on, a folder per benchmark. online: fetch what is missing;
    a folder that the user names is used as it is.
    """

    folder: Path
    online: bool = True

    def file(self, task: str, name: str) -> Path:
        """A benchmark's file, fetched if need be; UserError for a missing one, or one with another checksum."""
        if task not in FILES:
            raise unknown("benchmark", task, FILES)
        (published,) = [each for each in FILES[task] if each.name == name]
        return self.get(task, published)

    def get(self, task: str, published: File) -> Path:
        """A published file in the folder of a benchmark; as `file`."""
        path = self.folder / task / published.name
        if not path.is_file():
            if not self.online:
                raise UserError(f"--data-dir: {path} is missing; it is published at {published.url}")
            fetch(published, path)
        check(published, path)
        return path


def fetch(published: File, path: Path) -> None:
    """Download to `path`, whole or not at all."""
    log.warning("downloading %s (licence: %s) to %s", published.url, published.licence, path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(published.url, timeout=60) as response, partial.open("wb") as file:
            shutil.copyfileobj(response, file)
        if published.sha256 or published.md5:
            compare(published, partial)
        os.replace(partial, path)
    except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
        reason = getattr(error, "reason", error)
        raise UserError(
            f"{published.url}: could not be downloaded ({reason}); put the file at {path}, or give --data-dir"
        ) from error
    except OSError as error:
        raise UserError(f"{path}: could not be written ({error.strerror})") from error
    finally:
        partial.unlink(missing_ok=True)


def check(published: File, path: Path) -> None:
    """The published checksum where there is one; else the one seen first, with a warning when it changes."""
    if published.sha256 or published.md5:
        compare(published, path)
        return
    size, seen = path.stat(), path.with_name("checksums.json")
    known = json.loads(seen.read_text(encoding="utf-8")) if seen.is_file() else {}
    stamp = [size.st_size, size.st_mtime_ns]
    before = known.get(path.name)
    if before is not None and before["stamp"] == stamp:
        return
    sha256 = file_digest(path)
    if before is not None and before["sha256"] != sha256:
        log.warning("%s changed: its SHA-256 was %s and is %s", path, before["sha256"], sha256)
    try:
        atomic_text(seen, json.dumps({**known, path.name: {"sha256": sha256, "stamp": stamp}}, indent=1) + "\n")
    except UserError:
        log.warning("%s: the checksum of %s could not be noted", seen, path.name)


def compare(published: File, path: Path) -> None:
    """UserError where a file is not the published one."""
    kind, wanted = ("SHA-256", published.sha256) if published.sha256 else ("MD5", published.md5 or "")
    found = file_digest(path, kind)
    if found != wanted:
        raise UserError(
            f"{path.with_name(published.name)}: not the published file: {kind} {found[:12]}..., published is "
            f"{wanted[:12]}...; remove it, or take it from {published.url}"
        )


def file_digest(path: Path, kind: str = "SHA-256") -> str:
    """SHA-256, or MD5, of a file."""
    with path.open("rb") as file:
        if kind == "MD5":
            return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
        return hashlib.file_digest(file, "sha256").hexdigest()
