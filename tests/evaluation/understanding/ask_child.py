"""What a process does that answers MMStar, slowly so that it can be killed."""

from __future__ import annotations

import hashlib
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import diptych
from diptych.evaluation import evaluate as module
from diptych.evaluation.download import Data
from diptych.evaluation.evaluate import evaluate
from diptych.evaluation.task import Tools


def answer(data: Path, output: Path, seconds: float = 0) -> None:
    """Evaluate with a pause of so many seconds before each answer."""
    benchmark = module.UNDERSTANDING["mmstar"]
    (file,) = benchmark.files
    md5 = hashlib.md5((data / "mmstar" / file.name).read_bytes()).hexdigest()
    module.UNDERSTANDING["mmstar"] = replace(benchmark, files=(replace(file, md5=md5),), max_new_tokens=4)
    engine = diptych.load("toy/mllm")
    inner: Any = engine.system.generate_text

    def slowly(*args: Any, **options: Any) -> list[str]:
        time.sleep(seconds)
        return inner(*args, **options)

    engine.system.generate_text = slowly  # type: ignore[method-assign]
    evaluate(engine, ["mmstar"], output=output, tools=Tools(data=Data(folder=data, online=False)), batch_size=1)
