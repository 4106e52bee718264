"""The documentation says what the code does: commands, recipe keys and their defaults, examples, links."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import json
import re
import shlex
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

import diptych
from diptych.cli import options
from diptych.cli.main import COMMANDS, main
from diptych.core.errors import UserError
from diptych.core.sample import TASKS, Task
from diptych.core.schema import read
from diptych.data.rows import KEYS, parse_row
from diptych.evaluation import outcomes
from diptych.inference.engine import Engine
from diptych.inference.sampling import Sampling
from diptych.objectives.flow_matching import FlowMatching
from diptych.recipes import legacy, recipe, study, study_results
from diptych.recipes.recipe import (
    BagelSpec,
    ComposedSpec,
    DataSpec,
    MLLMSpec,
    OmniGen2Spec,
    OvisU1Spec,
    Part,
    Recipe,
    SourceSpec,
    StageSpec,
)
from diptych.recipes.study import RunSpec, StudySpec, TaskSpec
from diptych.recipes.study_claims import BenchSpec, ClaimSpec
from diptych.systems.prompts import Prompts
from diptych.training.config import OptimizerConfig, RunConfig, ScheduleConfig

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
SECTIONS: dict[str, type] = {
    "## Top level": Recipe,
    "## system, kind composed": ComposedSpec,
    "### flow": FlowMatching,
    "### prompts": Prompts,
    "## system, kind ovis_u1": OvisU1Spec,
    "### Parts": Part,
    "## system, kind mllm": MLLMSpec,
    "## system, kind bagel": BagelSpec,
    "## system, kind omnigen2": OmniGen2Spec,
    "## stages": StageSpec,
    "### optimizer": OptimizerConfig,
    "### schedule": ScheduleConfig,
    "## data": DataSpec,
    "### sources": SourceSpec,
    "## run": RunConfig,
    "## sampling": Sampling,
    "### The study": StudySpec,
    "### Its runs": RunSpec,
    "### Its tasks": TaskSpec,
    "### Its claims": ClaimSpec,
    "### Its bench": BenchSpec,
}
"""Headings of docs/recipes.md and what their first table describes."""

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def blocks(page: Path, *languages: str) -> list[str]:
    """Fenced code of these languages."""
    found = re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [code for language, code in found if language in languages]


def commands(page: Path) -> list[list[str]]:
    """The words of every `diptych` command in the page's shell blocks."""
    lines = "\n".join(blocks(page, "sh")).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("diptych ")]


def generator(name: str = "make_cli") -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_cli_page_is_what_the_parsers_say() -> None:
    written = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    assert written == generator().page(), "docs/cli.md is out of date; run: python docs/make_cli.py"


def test_evidence_page_is_what_studies_and_committed_results_say() -> None:
    written = (ROOT / "docs" / "evidence.md").read_text(encoding="utf-8")
    assert written == generator("make_evidence").page(), "out of date; run: python docs/make_evidence.py"


def test_evidence_comes_from_committed_results_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make = generator("make_evidence")
    for name in ("RESULTS", "IMAGES"):
        monkeypatch.setattr(make, name, tmp_path)
    monkeypatch.setattr(study, "STUDIES", tmp_path)
    monkeypatch.setattr(study, "build_system", lambda *args, **options: None)
    monkeypatch.setattr(study, "check_parts", lambda *args: None)
    claim = {"text": "It helps.", "source": "t. 1", "paper": "0.9", "task": "toyeval", "threshold": 0.1, "over": ["b"]}
    plain = {
        "title": "Small",
        "tasks": {"toyeval": {}},
        "runs": {name: {"recipe": "toy/iomm_pretrain_image"} for name in "abc"},
        "claims": {"gain": {**claim, "row": "a"}, "other": {**claim, "row": "c"}},
        "bench": {"row": "a", "task": "toyeval"},
    }
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(plain), encoding="utf-8")
    page = make.page()
    assert "Of 2 claims, holds: 0, does not hold: 0, cannot be told: 0, not run: 2." in page
    assert page.count("not run yet") == 1, "the study"
    assert page.count("`small`, `gain`") == page.count("`small`, `other`") == 1
    wanted = study.load("small")
    results = study_results.collect(wanted, study.plan(wanted, (0, 1, 2), tmp_path))
    for row, right in (("a", 80), ("b", 20)):
        scores = {("single", str(n)): [float(n < right)] for n in range(100)}
        layout, packed = outcomes.pack(scores, "categories", row)
        results["items"][layout.digest] = layout.plain()
        entry = {"overall": right / 100, "interval": [0, 1], "categories": {}, "figures": {}}
        entry |= {"items": layout.digest, "outcomes": packed}
        for seed in "012":
            results["runs"][row]["seeds"][seed] = {"tasks": {"toyeval": entry}, "scores": {"toyeval": [[500, 0.1]]}}
    path = tmp_path / "small.json"
    path.write_text(json.dumps(results), encoding="utf-8")
    page = make.page()
    assert "+0.600 (+0.5" in page
    assert page.count("holds: the interval lies above 0.1") == 1
    assert "Of 2 claims, holds: 1, does not hold: 0, cannot be told: 0, not run: 1." in page
    assert page.index("`small`, `gain`") < page.index("Not run yet:") < page.index("`small`, `other`")
    assert "small: Demanded: a scores between 0.3 and 0.7" in page
    assert "It does not pass." in page
    assert "](images/evidence_small_steps.png)" in page
    make.draw("small", make.results_of("small"))
    assert {each.name for each in tmp_path.glob("*.png")} == {"evidence_small_plot.png", "evidence_small_steps.png"}
    results["claims"]["gain"]["stated"]["threshold"] = -0.5
    path.write_text(json.dumps(results), encoding="utf-8")
    with pytest.raises(ValueError, match=r"claim 'gain' is not what studies/small\.yaml states"):
        make.page()


@pytest.mark.parametrize("name", COMMANDS)
def test_every_flag_is_documented(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--help"]) == 0
    flags = set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", capsys.readouterr().out)) - {"-h", "--help", "--verbose"}
    assert "-v" in flags
    text = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    own = text.split(f"## diptych {name}\n")[1].split("\n## ")[0] + text.split("\n## ")[0]
    assert {flag for flag in flags if not re.search(rf"`[^`]*{flag}\b", own)} == set()


@pytest.mark.parametrize("heading", SECTIONS)
def test_recipe_keys_and_defaults(heading: str) -> None:
    text = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    section = text.split(f"\n{heading}\n")[1].split("\n#")[0]
    rows = re.findall(r"^\| `(\w+)` \| ([^|]*) \|", section, re.MULTILINE)
    documented = {name: default.strip() for name, default in rows}
    assert len(rows) == len(documented)
    assert documented == {field.name: shown(field) for field in dataclasses.fields(SECTIONS[heading])}


def shown(field: dataclasses.Field[Any]) -> str:
    """A default as the page writes it."""
    value = field.default
    if field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
        if isinstance(value, Part):
            return f"{{kind: {value.kind}}}"
        if dataclasses.is_dataclass(value):
            return "see below"
    if value is dataclasses.MISSING:
        return "required"
    return value if isinstance(value, str) else json.dumps(value)


def test_toy_page_has_the_recipes_budgets() -> None:
    text = (ROOT / "docs" / "toy.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(toy/\w+)` \| (\w+) \| ([\d,]+) \| (\d+) \| ([\d,]+) \|", text, re.MULTILINE)
    told = [
        (name, stage_name, f"{stage.steps:,}", str(stage.batch_size), f"{stage.steps * stage.batch_size:,}")
        for name in (
            "toy/mllm",
            "toy/mllm_edits",
            "toy/iomm_pretrain_image",
            "toy/iomm_finetune_mix",
            "toy/iomm_distill",
            "toy/bagel",
            "toy/omnigen2",
            "toy/hieraquery",
            "toy/ovis_u1",
        )
        for stage_name, stage in recipe.load(name)[0].stages.items()
    ]
    assert rows == told


@pages
def test_commands_parse(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the real parsers; recipes are found, and what they are told with --set fits."""
    monkeypatch.chdir(tmp_path)
    for code in blocks(page, "yaml"):
        if name := re.match(r"# (\w+\.yaml)", code):
            Path(name[1]).write_text(code, encoding="utf-8")
    for words in commands(page):
        if words[0].startswith("-"):
            assert main(words) == 0
            continue
        assert words[0] in COMMANDS, words
        args = generator().parser_of(words[0]).parse_strictly(words[1:])
        if getattr(args, "size", None) is not None and words[0] != "confusions":
            options.size(args.size)
        if words[0] == "new" and args.output is not None:
            Path(args.output).write_text("base: toy/iomm_finetune_mix\n")  # the real one: tests/test_your_pictures.py
        if words[0] in ("train", "check") and args.recipe != "RECIPE":
            recipe.load(args.recipe, args.set)
        if words[0] == "study" and args.name is not None:
            study.load(args.name, args.set)
        if words[0] == "recipes" and args.name is not None:
            recipe.load(args.name, args.set)


def test_readme_shows_every_kind_of_use() -> None:
    assert {"generate", "edit", "ask", "eval", "train", "check", "recipes"} <= {
        words[0] for words in commands(ROOT / "README.md")
    }


@pages
def test_yaml_examples_are_read(page: Path, tmp_path: Path) -> None:
    for code in blocks(page, "yaml"):
        plain = yaml.safe_load(code)
        path = tmp_path / "example.yaml"
        path.write_text(code, encoding="utf-8")
        if "runs" in plain:
            study.plan(study.load(str(path)), [0], tmp_path)
        elif set(plain) & {"base", "system"}:
            recipe.load(str(path))
        else:
            data = plain.get("data", plain)
            read(DataSpec, data, page.name)


def test_changelog_names_every_renamed_key() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").split("\n## 0.1.0\n")[0]
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    for section, keys in legacy.KEYS.items():
        for old, new in keys.items():
            new = new.removeprefix("guidance.")
            assert any(f"`{old}`" in row and new in row for row in rows), (section, old, new)


def test_rows_in_the_data_page_are_rows() -> None:
    lines = [line for code in blocks(ROOT / "docs" / "data.md", "json") for line in code.splitlines()]
    assert len(lines) >= 6
    served: set[Task] = set()
    for line in lines:
        row = json.loads(line)
        fits = [task for task in KEYS if set(row) <= {*KEYS[task], "id", "width", "height"} and parses(row, task)]
        assert fits, line
        served.update(fits)
    assert served == set(TASKS)


def parses(row: dict[str, Any], task: Task) -> bool:
    try:
        parse_row(row, task, "row")
    except UserError:
        return False
    return True


@pages
def test_python_examples_use_public_names(page: Path) -> None:
    public = {"diptych": set(diptych.__all__), "model": set(dir(Engine))}
    for code in blocks(page, "python"):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in public:
                assert node.attr in public[node.value.id], node.attr


@pages
def test_links_and_targets_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for link in re.findall(r"(?<!!)\[[^\]]*\]\(([^)#:]+)(?:#[\w-]*)?\)", text):
        assert (page.parent / link).exists(), link
    for anchored, anchor in re.findall(r"\]\(([^)#:]*)#([\w-]+)\)", text):
        target = page.parent / anchored if anchored else page
        headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
        assert anchor in {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}, anchor
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make (\w+)", "\n".join(blocks(page, "", "sh")), re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
