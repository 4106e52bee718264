"""What a process does that makes and scores CLIPScore's pictures, alone or in a group."""

from __future__ import annotations

import hashlib
from pathlib import Path

from diptych.evaluation import download
from diptych.evaluation.download import Data, File
from diptych.evaluation.evaluate import evaluate
from diptych.evaluation.task import Tools
from diptych.recipes.load import load


def score(model: str, data: Path, clip: str, output: Path) -> None:
    sha256 = hashlib.sha256((data / "clipscore" / "8k_coco.txt").read_bytes()).hexdigest()
    download.FILES["clipscore"] = (File(url="https://nowhere.invalid/8k_coco.txt", sha256=sha256, licence="none"),)
    tools = Tools(data=Data(folder=data, online=False), clip=clip)
    evaluate(load(model, device="cpu"), ["clipscore"], output=output, tools=tools)
