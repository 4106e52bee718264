"""What tasks whose outputs a judge looks at have in common: wording, failures, and many questions at a time."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image

from diptych.core.errors import UserError
from diptych.data.imaging import UNREADABLE
from diptych.evaluation.judge import Judge, JudgeDown, Reply, lasting
from diptych.evaluation.judge_prompts import PROMPTS
from diptych.evaluation.task import Row, Tools

T = TypeVar("T")
R = TypeVar("R")


def judged(judge: Judge, outputs: Iterable[T], look: Callable[[T], R]) -> Iterator[tuple[T, R]]:
    """`look` at every output, as many at a time as the judge has workers.

    When the judge is down, what was under way is still given, and then `JudgeDown` is raised.
    """
    waiting: dict[Future[R], T] = {}
    rest = iter(outputs)
    down: JudgeDown | None = None
    with ThreadPoolExecutor(max(1, judge.workers)) as pool:
        while True:
            while down is None and len(waiting) < max(1, judge.workers):
                output = next(rest, None)
                if output is None:
                    break
                waiting[pool.submit(look, output)] = output
            if not waiting:
                break
            done, _ = wait(waiting, return_when=FIRST_COMPLETED)
            for future in done:
                output = waiting.pop(future)
                try:
                    yield output, future.result()
                except JudgeDown as error:
                    down = error
    if down is not None:
        raise down


def failed(reason: str, replies: Sequence[Reply] = (), **detail: Any) -> Row:
    """A row without a score. `again`: the reason may go away, so that a resumed run tries once more."""
    again = any(not lasting(reply) for reply in replies)
    return {"score": None, "failure": reason, "again": again, "detail": detail}


def wording(tools: Tools, name: str) -> str:
    """A judge prompt: the user's, or ours."""
    return tools.prompts.get(name, PROMPTS[name])


def prompt_label(tools: Tools, *names: str) -> str:
    """How results name the judge's questions."""
    given = [name for name in names if name in tools.prompts]
    if not given:
        return "diptych"
    text = json.dumps([wording(tools, name) for name in names])
    return f"given ({hashlib.sha256(text.encode()).hexdigest()[:12]})"


def fill(template: str, **values: str) -> str:
    """A template with its {names} filled; braces within the values stay."""
    try:
        return template.format(**values)
    except (KeyError, IndexError, ValueError) as error:
        raise UserError(
            f"--judge-prompts: a prompt has a place {error} that is not known: {', '.join(values)}"
        ) from error


def picture_bytes(path: Path) -> bytes:
    """The file, if it is a picture; UserError otherwise."""
    data = path.read_bytes()
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.verify()
    except UNREADABLE as error:
        raise UserError(f"{path}: not a readable picture") from error
    return data


def judge_about(judge: Judge) -> dict[str, Any]:
    """What decides a judge's answers, as results name it."""
    return {f"judge_{name}": value for name, value in judge.about().items()}
