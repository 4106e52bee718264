"""A process that answers MMStar, slowly so that it can be killed: python ask_child.py DATA OUTPUT slow|fast."""

from __future__ import annotations

import hashlib
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import diptych
from diptych.evaluation import evaluate as module
from diptych.evaluation.download import Data
from diptych.evaluation.evaluate import evaluate
from diptych.evaluation.task import Tools

data, output, pace = sys.argv[1:]
benchmark = module.UNDERSTANDING["mmstar"]
(file,) = benchmark.files
md5 = hashlib.md5((Path(data) / "mmstar" / file.name).read_bytes()).hexdigest()
module.UNDERSTANDING["mmstar"] = replace(benchmark, files=(replace(file, md5=md5),), max_new_tokens=4)
engine = diptych.load("toy/mllm")
inner: Any = engine.system.generate_text


def slowly(*args: Any, **options: Any) -> list[str]:
    time.sleep(0.3 if pace == "slow" else 0)
    return inner(*args, **options)


engine.system.generate_text = slowly  # type: ignore[method-assign]
evaluate(engine, ["mmstar"], output=output, tools=Tools(data=Data(folder=Path(data), online=False)), batch_size=1)
