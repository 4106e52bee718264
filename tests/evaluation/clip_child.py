"""A process that makes and scores CLIPScore's pictures, alone or under torchrun: clip_child.py MODEL DATA CLIP OUT."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

from diptych.evaluation import download
from diptych.evaluation.download import Data, File
from diptych.evaluation.evaluate import evaluate
from diptych.evaluation.task import Tools
from diptych.recipes.load import load

model, data, clip, output = sys.argv[1:]
sha256 = hashlib.sha256((Path(data) / "clipscore" / "8k_coco.txt").read_bytes()).hexdigest()
download.FILES["clipscore"] = (File(url="https://nowhere.invalid/8k_coco.txt", sha256=sha256, licence="none"),)
tools = Tools(data=Data(folder=Path(data), online=False), clip=clip)
evaluate(load(model, device="cpu"), ["clipscore"], output=output, tools=tools)
