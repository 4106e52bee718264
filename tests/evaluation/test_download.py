"""What is fetched is pinned; archives stay in their folder; scorers are safetensors in float32."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from diptych.core.errors import UserError
from diptych.evaluation import download
from diptych.evaluation.archives import below, unpack
from diptych.evaluation.clip import Clip
from diptych.evaluation.download import FILES, Data, File, file_digest, pinned_model
from diptych.evaluation.geneval_models import Detector
from diptych.evaluation.judge_models import TransformersJudge
from diptych.evaluation.task import Item


def tar_of(path: Path, names: list[str]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = 2
            tar.addfile(member, io.BytesIO(b"ab"))
    return path


@pytest.mark.parametrize("name", ["b/singleturn/../../../x", "b/singleturn//../../x", "/singleturn/x", "singleturn\\x"])
def test_members_of_archives_stay_inside(name: str, tmp_path: Path) -> None:
    archive = tar_of(tmp_path / "a.tar", ["b/singleturn/ok.png", name])
    with pytest.raises(UserError, match=r"a\.tar: the name .* outside"):
        unpack(archive, tmp_path / "deep" / "folder" / "out", below("singleturn"))
    left = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert left == [archive], "nothing of it is kept"


def test_archives_are_unpacked_by_plain_files_alone(tmp_path: Path) -> None:
    archive = tar_of(tmp_path / "a.tar", ["Benchmark/singleturn/p/0.png", "Benchmark/other/1.png"])
    with tarfile.open(archive, "a") as tar:
        link = tarfile.TarInfo("Benchmark/singleturn/link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc"
        tar.addfile(link)
    unpack(archive, tmp_path / "out", below("singleturn"))
    assert [str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.*")] == ["p/0.png"]
    twice = tar_of(tmp_path / "b.tar", ["singleturn/a", "x/singleturn/a"])
    with pytest.raises(UserError, match="holds 'x/singleturn/a' twice"):
        unpack(twice, tmp_path / "out2", below("singleturn"))
    (tmp_path / "c.tar").write_bytes(archive.read_bytes()[:700])
    with pytest.raises(UserError, match=r"c\.tar: not a readable archive"):
        unpack(tmp_path / "c.tar", tmp_path / "out3", below("singleturn"))


def test_names_in_tables_are_names_of_files() -> None:
    item = Item(id="../x", prompt="p", category="all", files=("../../x.png", "a/b.png"))
    assert ".." not in item.files[0].split("/")
    assert item.files[1] == "a/b.png"


def test_what_has_no_checksum_is_not_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def get(published: File, path: Path) -> None:
        path.parent.mkdir(parents=True)
        path.write_bytes(b"data")

    monkeypatch.setattr(download, "fetch", get)
    file = File(url="https://nowhere.invalid/a.tar", sha256=None, licence="x")
    with pytest.raises(UserError, match=r"its checksum is not known, .* or give --allow-unpinned"):
        Data(folder=tmp_path).get("task", file)
    assert Data(folder=tmp_path, allow_unpinned=True).get("task", file).read_bytes() == b"data"
    assert Data(folder=tmp_path).get("task", file).is_file(), "a file that is there is the user's"
    with pytest.raises(UserError, match="stepfun-ai/GEdit-Bench: its commit is not known"):
        download.fetch_dataset("stepfun-ai/GEdit-Bench", tmp_path, allow_unpinned=False)


def test_addresses_with_a_checksum_name_a_revision() -> None:
    for task, files in FILES.items():
        for file in files:
            moving = "/main/" in file.url or "/master/" in file.url
            assert moving == (file.checksum is None), (task, file.name)


def test_digests_are_those_of_the_tools(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"hello\n")
    assert file_digest(tmp_path / "f", "git blob") == "ce013625030ba8dba906f756967f9e9ca394464a"  # git hash-object
    assert file_digest(tmp_path / "f", "MD5") == "b1946ac92492d2347c6235b4d2611184"  # md5sum
    assert file_digest(tmp_path / "f").startswith("5891b5b522d5df08")  # sha256sum


@pytest.mark.parametrize("damage", ["{", "[]", '{"f": 3}', "[" * 100_000])
def test_a_damaged_note_of_checksums_is_no_obstacle(damage: str, tmp_path: Path) -> None:
    (tmp_path / "task").mkdir()
    (tmp_path / "task" / "f").write_bytes(b"data")
    (tmp_path / "task" / "checksums.json").write_text(damage)
    Data(folder=tmp_path).get("task", File(url="https://nowhere.invalid/f", sha256=None, licence="x"))
    assert json.loads((tmp_path / "task" / "checksums.json").read_text())["f"]["sha256"].startswith("3a6eb0790f39ac87")


def test_models_that_score_are_pinned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # a folder of the name would be taken for the model
    assert pinned_model(str(tmp_path), "--clip") == (str(tmp_path), None)
    name, commit = pinned_model("openai/clip-vit-large-patch14", "--clip")
    assert (name, len(commit or "")) == ("openai/clip-vit-large-patch14", 40)
    assert pinned_model(f"a/b@{'0' * 40}", "--clip") == ("a/b", "0" * 40)
    assert pinned_model("a/b", "--clip", allow_unpinned=True) == ("a/b", None)
    for bad, message in (("a/b", "--allow-unpinned"), ("a/b@main", "40 hexadecimal"), ("../x", "no such folder")):
        with pytest.raises(UserError, match=message):
            pinned_model(bad, "--clip")


Eyes = tuple[str, str]


def test_scorers_are_float32_whatever_the_checkpoint(tiny_eyes: Eyes, tmp_path: Path) -> None:
    folders: list[Path] = []
    for place in tiny_eyes:
        copy = tmp_path / Path(place).name
        copy.mkdir()
        for path in Path(place).iterdir():
            (copy / path.name).write_bytes(path.read_bytes())
        weights = {name: value.bfloat16() for name, value in load_file(copy / "model.safetensors").items()}
        save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((copy / "config.json").read_text())
        (copy / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
        folders.append(copy)
    assert Detector(str(folders[0])).model.dtype == torch.float32
    clip = Clip(str(folders[1]))
    assert clip.model.dtype == torch.float32
    low = Clip(str(folders[1]), dtype=torch.bfloat16)
    picture = Image.effect_mandelbrot((16, 16), (-2, -1, 1, 1), 20).convert("RGB")
    difference = (clip.images([picture]) - low.images([picture])).abs().max()
    assert 0 < difference < 0.5, "half precision is there for who asks, and is another figure"


def replaced(folder: str, copy: Path, change: Callable[[Path], None]) -> str:
    copy.mkdir()
    for path in Path(folder).iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    change(copy)
    return str(copy)


def test_pickles_are_refused(tiny_eyes: Eyes, tmp_path: Path) -> None:
    def to_pickle(folder: Path) -> None:
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()

    clip = replaced(tiny_eyes[1], tmp_path / "clip", to_pickle)
    with pytest.raises(UserError, match=r"--clip .*no \.safetensors; pytorch_model\.bin is a pickle"):
        Clip(clip)
    detector = replaced(tiny_eyes[0], tmp_path / "m2f", to_pickle)
    with pytest.raises(UserError, match=r"--detector .*no \.safetensors"):
        Detector(detector)


def test_code_that_comes_with_a_model_is_not_run(tmp_path: Path) -> None:
    code = "from pathlib import Path\nPath(__file__).with_name('ran').touch()\nclass X: pass\n"
    (tmp_path / "code.py").write_text(code)
    names = ("AutoConfig", "AutoProcessor", "AutoModelForImageTextToText", "AutoTokenizer")
    auto = dict.fromkeys(names, "code.X")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": auto}))
    (tmp_path / "processor_config.json").write_text(json.dumps({"auto_map": auto, "processor_class": "X"}))
    with pytest.raises(UserError, match="--judge hf:"):
        TransformersJudge(str(tmp_path))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "config", ["", "{", "[]", "3", '{"model_type": 5}', '{"model_type": "clip", "text_config": 3}']
)
def test_broken_folders_are_one_line(config: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(config)
    for open_it in (Clip, Detector, TransformersJudge):
        with pytest.raises(UserError, match="could not be loaded") as caught:
            open_it(str(tmp_path))
        assert "\n" not in str(caught.value)
