"""lmms-eval drives a shipped model through the plugin (the extra `lmms`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lmms_eval", reason="needs the extra lmms")
pytestmark = [pytest.mark.lmms, pytest.mark.filterwarnings("ignore")]  # lmms-eval and its dependencies warn freely

TASK = """
task: toy_colours
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: generate_until
doc_to_visual: !function pictures.visual
doc_to_text: !function pictures.text
doc_to_target: answer
generation_kwargs: {max_new_tokens: 8, temperature: 0, do_sample: false, until: ["\\n\\n"]}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true, ignore_case: true}
"""
PICTURES = """
from PIL import Image

def visual(doc):
    return [Image.open(doc["file"]).convert("RGB")]

def text(doc):
    return doc["question"]
"""


@pytest.fixture
def task_folder(tmp_path: Path) -> Path:
    from diptych.data.imaging import to_pil
    from diptych.toyworld.samples import ToyWorld

    world = ToyWorld(5, 32, text_only=0.0, captions=0.0)
    rows: list[dict[str, str]] = []
    for at in range(6):
        sample = world.sample("understand", at)
        to_pil(sample.context_images[0]).save(tmp_path / f"{at}.png")
        question = sample.messages[0].text.replace("<image>", "").strip()
        rows.append({"file": str(tmp_path / f"{at}.png"), "question": question, "answer": sample.messages[1].text})
    (tmp_path / "rows.json").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "pictures.py").write_text(PICTURES)
    (tmp_path / "toy_colours.yaml").write_text(TASK.replace("DATA", str(tmp_path / "rows.json")))
    return tmp_path


def test_lmms_eval_drives_a_model(task_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(task_folder / "cache"))
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.models import MODEL_REGISTRY_V2
    from lmms_eval.tasks import TaskManager

    import diptych
    from diptych.recipes.lmms import DiptychModel, manifest

    if "diptych" not in MODEL_REGISTRY_V2.list_model_names():  # the package was installed before it had the plugin
        MODEL_REGISTRY_V2.register_manifest(manifest())
    assert MODEL_REGISTRY_V2.get_model_class("diptych") is DiptychModel
    found: Any = simple_evaluate(
        model="diptych",
        model_args="pretrained=toy/mllm",
        tasks=["toy_colours"],
        batch_size=4,
        device="cpu",
        task_manager=TaskManager(include_path=str(task_folder), include_defaults=False),
        bootstrap_iters=0,
    )
    rows = [json.loads(line) for line in (task_folder / "rows.json").read_text().splitlines()]
    engine = diptych.load("toy/mllm")
    from PIL import Image

    ours = engine.ask([Image.open(row["file"]) for row in rows], [row["question"] for row in rows], max_new_tokens=8)
    samples = sorted(found["samples"]["toy_colours"], key=lambda sample: sample["doc_id"])
    assert [sample["filtered_resps"][0] for sample in samples] == [reply.strip() for reply in ours]
    right = [reply.strip().lower() == row["answer"].lower() for reply, row in zip(ours, rows, strict=True)]
    assert found["results"]["toy_colours"]["exact_match,none"] == pytest.approx(sum(right) / len(right))


def test_what_a_conversation_may_hold() -> None:
    import torch
    from PIL import Image

    from diptych.core.errors import UserError
    from diptych.recipes.lmms import conversation, cut

    picture = {"type": "image", "url": Image.new("RGB", (4, 6))}
    turns = [{"role": "user", "content": [picture, {"type": "text", "text": "what <image>?"}, picture]}]
    messages, pictures = conversation(turns, torch.device("cpu"))
    assert messages[0].text == "<image>\nwhat ?\n<image>"
    assert [tuple(one.shape) for one in pictures] == [(3, 6, 4)] * 2
    with pytest.raises(UserError, match="'video'"):
        conversation([{"role": "user", "content": [{"type": "video", "url": "x"}]}], torch.device("cpu"))
    assert (cut("a\n\nb", ["\n\n"]), cut("a", "\n"), cut("a b", None)) == ("a", "a", "a b")
