"""A process that scores WISE pictures, to be killed: python wise_child.py DATA IMAGES OUTPUT URL."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

from diptych.evaluation import download
from diptych.evaluation.download import Data, File
from diptych.evaluation.evaluate import evaluate
from diptych.evaluation.judge import CachedJudge
from diptych.evaluation.judge_endpoint import Endpoint, EndpointJudge
from diptych.evaluation.judged_tasks import WiseLegacy
from diptych.evaluation.task import Tools

data, images, output, url = sys.argv[1:]
download.FILES["wise_legacy"] = tuple(
    File(url=f"https://nowhere.invalid/{name}", sha256=hashlib.sha256(path.read_bytes()).hexdigest(), licence="none")
    for name in WiseLegacy.files
    for path in [Path(data) / "wise_legacy" / name]
)
judge = CachedJudge(EndpointJudge(Endpoint(url=url, model="m", workers=1)), Path(output) / "judge.jsonl")
tools = Tools(data=Data(folder=Path(data), online=False), judge=judge)
evaluate(None, ["wise_legacy"], output=output, images=images, tools=tools)
