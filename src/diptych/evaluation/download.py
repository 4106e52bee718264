"""Benchmark data and the models that score: fetched from their publishers on first use, and never part of this package.

Only what is pinned is fetched: a file by its checksum, a model by the commit of its repository. What is not pinned has
to be put into the folder by the user, or allowed with --allow-unpinned.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import logging
import os
import re
import urllib.error
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diptych.core import web
from diptych.core.errors import UserError, unknown
from diptych.core.files import write_file, write_text

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class File:
    """A published file: where it is, what it must hash to (None where that is not known), and its licence.

    md5, git_blob: in place of a SHA-256, where that is what the publisher gives; git_blob is the name of the file's
    contents in a git repository (SHA-1).
    """

    url: str
    sha256: str | None
    licence: str
    md5: str | None = None
    git_blob: str | None = None

    @property
    def checksum(self) -> tuple[str, str] | None:
        """Its kind and its value, where there is one."""
        every = {"SHA-256": self.sha256, "git blob": self.git_blob, "MD5": self.md5}
        return next(((kind, value) for kind, value in every.items() if value), None)

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
    "dpg": (
        File(
            url=f"https://raw.githubusercontent.com/{_ELLA[0]}/{_ELLA[1]}/dpg_bench/dpg_bench.csv",
            sha256=None,
            git_blob="98457fc9901943f51ff9a30367250fc292533bed",
            licence=STATED,
        ),
    ),
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
        _github(
            "openai/dalle3-eval-samples",
            "d7c88c07b492ad7b9fd3003126d00719a2edabb1",
            "prompts/8k_coco.txt",
            "adb3104d68aae027be0da1d078f9ea7eca83f07d098aaa39a400dc6474640c8a",
            STATED,
        ),
    ),
}


COMMITS: dict[str, str] = {"openai/clip-vit-large-patch14": "32bd64288804d66eefd0ccbe215aa642df71cc41"}
"""Commits of the hub's models that score."""


def pinned_model(name: str, option: str, *, allow_unpinned: bool = False) -> tuple[str, str | None]:
    """A model of transformers that scores: its folder or hub id, and the commit to take from the hub.

    Args:
        name: a folder, a hub id, or a hub id with a commit, as owner/name@32bd64... (40 digits).

    Raises:
        UserError: no such folder, or a hub id whose commit is neither given nor known, without `allow_unpinned`.
    """
    if name and Path(name).expanduser().is_dir():
        return str(Path(name).expanduser()), None
    hub_id, _, commit = name.partition("@")
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", hub_id):
        raise UserError(f"{option} {name}: no such folder, and no hub id (owner/name)")
    if commit and not re.fullmatch(r"[0-9a-f]{40}", commit):
        raise UserError(f"{option} {name}: a commit is 40 hexadecimal digits")
    commit = commit or COMMITS.get(hub_id, "")
    if not commit and not allow_unpinned:
        raise UserError(
            f"{option} {name}: the commit to take is not known, so that nobody can tell what would be loaded; write "
            f"{hub_id}@COMMIT, or give a folder" + (" or --allow-unpinned" if option.startswith("--") else "")
        )
    return hub_id, commit or None


def default_folder() -> Path:
    """Where downloads are kept: $DIPTYCH_DATA, or diptych/benchmarks in the user's cache."""
    given = os.environ.get("DIPTYCH_DATA")
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
    return Path(given).expanduser() if given else cache / "diptych" / "benchmarks"


@dataclass(frozen=True, kw_only=True)
class Data:
    """Where benchmark files are looked for.

    folder: holds GENEVAL/evaluation_metadata.jsonl and so on, a folder per benchmark. online: fetch what is missing;
    a folder that the user names is used as it is. allow_unpinned: also fetch what has no checksum, and models of the
    hub without a commit.
    """

    folder: Path
    online: bool = True
    allow_unpinned: bool = False

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
            if published.checksum is None and not self.allow_unpinned:
                raise UserError(
                    f"{published.url}: its checksum is not known, so that it is not downloaded; put a copy that you "
                    f"trust at {path}, or give --allow-unpinned"
                )
            fetch(published, path)
        check(published, path)
        return path


def fetch(published: File, path: Path) -> None:
    """Download to `path`, whole or not at all."""
    log.warning("downloading %s (licence: %s) to %s", published.url, published.licence, path)

    def write(temporary: Path) -> None:
        download(published.url, temporary)
        if published.checksum is not None:
            compare(published, temporary)

    try:
        write_file(path, write)
    except DownloadFailed as error:
        raise UserError(f"{error}; put the file at {path}, or give --data-dir") from error


class DownloadFailed(UserError):
    """An address gave no file."""


def download(url: str, path: Path) -> None:
    """What an address gives, into a file; DownloadFailed, also where it breaks off. Redirects from https to http are
    not followed."""
    try:
        with web.opener(redirects=True).open(url, timeout=60) as response, path.open("wb") as file:
            size = 0
            while part := response.read(2**20):
                file.write(part)
                size += len(part)
            expected = response.headers.get("Content-Length", "")
    except (urllib.error.URLError, TimeoutError, ConnectionError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or type(error).__name__
        raise DownloadFailed(f"{web.shown_url(url)}: could not be downloaded ({reason})") from error
    if expected.isdecimal() and size != int(expected):
        raise DownloadFailed(f"{web.shown_url(url)}: broke off after {size:,} of {int(expected):,} bytes")


def fetch_dataset(name: str, folder: Path, *, allow_unpinned: bool) -> None:
    """The parquet files of a hub dataset, whose commit is not known."""
    from huggingface_hub import snapshot_download

    if not allow_unpinned:
        raise UserError(
            f"{name}: its commit is not known, so that it is not downloaded; put its *.parquet files that you trust "
            f"into {folder}, or give --allow-unpinned"
        )
    try:
        snapshot_download(name, repo_type="dataset", local_dir=folder, allow_patterns=["*.parquet"])
    except (OSError, ValueError) as error:
        raise UserError(f"{name}: could not be downloaded ({type(error).__name__}); give --data-dir") from error


def check(published: File, path: Path) -> None:
    """The published checksum where there is one; else the one seen first, with a warning when it changes."""
    if published.checksum is not None:
        compare(published, path)
        return
    size, seen = path.stat(), path.with_name("checksums.json")
    known = seen_before(seen)
    stamp = [size.st_size, size.st_mtime_ns]
    before = known.get(path.name, {})
    if before.get("stamp") == stamp:
        return
    sha256 = file_digest(path)
    if before.get("sha256", sha256) != sha256:
        log.warning("%s changed: its SHA-256 was %s and is %s", path, before["sha256"], sha256)
    try:
        write_text(seen, json.dumps({**known, path.name: {"sha256": sha256, "stamp": stamp}}, indent=1) + "\n")
    except UserError:
        log.warning("%s: the checksum of %s could not be noted", seen, path.name)


def seen_before(path: Path) -> dict[str, dict[str, Any]]:
    """The checksums noted in a folder; nothing where the note cannot be read."""
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    entries = known.items() if isinstance(known, dict) else ()
    return {name: entry for name, entry in entries if isinstance(entry, dict)}


def compare(published: File, path: Path) -> None:
    """UserError where a file is not the published one."""
    assert published.checksum is not None, "there is something to compare with"
    kind, wanted = published.checksum
    digest = file_digest(path, kind)
    if digest != wanted:
        raise UserError(
            f"{path.with_name(published.name)}: not the published file: {kind} {digest[:12]}..., published is "
            f"{wanted[:12]}...; remove it, or take it from {published.url}"
        )


def file_digest(path: Path, kind: str = "SHA-256") -> str:
    """SHA-256, MD5, or the name as a git blob, of a file."""
    with path.open("rb") as file:
        if kind == "git blob":
            hashed = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
            while part := file.read(2**20):
                hashed.update(part)
            return hashed.hexdigest()
        if kind == "MD5":
            return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
        return hashlib.file_digest(file, "sha256").hexdigest()
