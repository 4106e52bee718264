"""What a process does that scores WISE pictures, to be killed."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path

from diptych.evaluation import download
from diptych.evaluation.download import Data, File
from diptych.evaluation.evaluate import evaluate
from diptych.evaluation.judge import CachedJudge
from diptych.evaluation.judge_endpoint import Endpoint, EndpointJudge
from diptych.evaluation.judged_tasks import WiseLegacy
from diptych.evaluation.task import Tools


def score(data: Path, images: Path, output: Path, url: str) -> None:
    """Ask the judge at this address, a question at a time."""
    download.FILES["wise_legacy"] = tuple(
        File(url=f"https://nowhere.invalid/{path.name}", sha256=sha256(path.read_bytes()).hexdigest(), licence="none")
        for path in (data / "wise_legacy" / name for name in WiseLegacy.files)
    )
    judge = CachedJudge(EndpointJudge(Endpoint(url=url, model="m", workers=1)), output / "judge.jsonl")
    tools = Tools(data=Data(folder=data, online=False), judge=judge)
    evaluate(None, ["wise_legacy"], output=output, images=images, tools=tools)
