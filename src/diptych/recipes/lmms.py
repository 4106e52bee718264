"""Every model as a model of lmms-eval (the extra `lmms`): `lmms-eval --model diptych --model_args pretrained=MODEL`.

lmms-eval finds `manifest` through the entry-point group `lmms_eval.models`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import torch
from lmms_eval.api.instance import Instance  # pyright: ignore[reportMissingImports]
from lmms_eval.api.model import lmms  # pyright: ignore[reportMissingImports]
from lmms_eval.models.registry_v2 import ModelManifest  # pyright: ignore[reportMissingImports]
from PIL import Image
from torch import Tensor

from diptych.core.errors import UserError, unknown
from diptych.core.sample import IMAGE_PLACEHOLDER, Message
from diptych.data.imaging import from_pil
from diptych.data.rows import ROLES
from diptych.recipes.lmms_tasks import refuse_drawing
from diptych.recipes.load import load

logger = logging.getLogger(__name__)

MAX_NEW_TOKENS = 128
"""Where a task does not say."""
SAMPLED = ("temperature", "top_p", "num_beams", "do_sample")


def manifest() -> ModelManifest:
    """What lmms-eval registers."""
    return ModelManifest(model_id="diptych", chat_class_path=f"{__name__}.DiptychModel")


class DiptychModel(lmms):
    """A model by its MODEL name: answers conversations with pictures, greedily.

    Args:
        pretrained: a shipped name, a run folder, a folder in save_pretrained layout, or a hub id.
        device: as of torch; None takes a GPU where there is one.
        batch_size: conversations that are answered together.

    Raises:
        UserError: videos or audio in a question, scoring by likelihood, conversations of several rounds, or a task
            whose replies are pictures.
    """

    is_simple = False

    def __init__(
        self, pretrained: str, device: str | None = None, batch_size: int | str = 1, max_batch_size: Any = None
    ) -> None:
        super().__init__()
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise UserError(f"batch_size must be a whole number of at least 1, not {batch_size!r}")
        self.engine = load(pretrained, device=device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.batch_size = int(batch_size)
        self._reported: set[str] = set()

    @torch.no_grad()
    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Replies in the order of the requests, each cut before its task's first stop text."""
        replies: dict[int, str] = {}
        by_length: dict[int, list[int]] = {}
        for name, to_messages in {request.args[4]: request.args[1] for request in requests}.items():
            owner = getattr(to_messages, "__self__", None)  # the task, whose method this is
            refuse_drawing(name, getattr(getattr(owner, "config", None), "process_results", None))
        for at, request in enumerate(requests):
            by_length.setdefault(self._length(request.args[2]), []).append(at)
        for length, places in by_length.items():
            for start in range(0, len(places), self.batch_size):
                group = places[start : start + self.batch_size]
                asked = [self._conversation(requests[at]) for at in group]
                conversations, images = [turns for turns, _ in asked], [pictures for _, pictures in asked]
                texts = self.engine.system.generate_text(conversations, images, max_new_tokens=length)
                for at, text in zip(group, texts, strict=True):
                    replies[at] = cut(text, requests[at].args[2].get("until"))
        return [replies[at] for at in range(len(requests))]

    def loglikelihood(self, requests: list[Instance]) -> NoReturn:
        raise UserError("diptych models answer questions; tasks scored by likelihood are not served")

    def generate_until_multi_round(self, requests: list[Instance]) -> NoReturn:
        raise UserError("diptych models answer once; tasks of several rounds are not served")

    def _length(self, options: Mapping[str, Any]) -> int:
        sampled = {name: options[name] for name in SAMPLED if options.get(name) not in (None, 0, 0.0, 1, 1.0, False)}
        for name, value in sampled.items():
            if name not in self._reported:
                logger.warning("%s=%s is not followed: diptych models answer greedily", name, value)
                self._reported.add(name)
        return int(options.get("max_new_tokens", MAX_NEW_TOKENS))

    def _conversation(self, request: Instance) -> tuple[list[Message], list[Tensor]]:
        _, to_messages, _, at, task, split = request.args
        return conversation(to_messages(self.task_dict[task][split][at]), self.engine.system.device)


def conversation(turns: Sequence[Mapping[str, Any]], device: torch.device) -> tuple[list[Message], list[Tensor]]:
    """lmms-eval's chat messages as ours, with their pictures, each (3, H, W) in [-1, 1], in reading order."""
    messages: list[Message] = []
    pictures: list[Tensor] = []
    for turn in turns:
        if turn["role"] not in ROLES:
            raise unknown("role", turn["role"], ROLES)
        pieces: list[str] = []
        parts = [{"type": "text", "text": turn["content"]}] if isinstance(turn["content"], str) else turn["content"]
        for part in parts:
            if part["type"] == "text":
                pieces.append(part["text"].replace(IMAGE_PLACEHOLDER, ""))
            elif part["type"] == "image" and isinstance(picture := part["url"], Image.Image):
                pieces.append(IMAGE_PLACEHOLDER)
                pictures.append(from_pil(picture).to(device))
            else:
                raise UserError(f"a question holds {part['type']!r}; diptych models read text and pictures")
        messages.append(Message(role=ROLES[turn["role"]], text="\n".join(pieces)))
    return messages, pictures


def cut(reply: str, until: str | Sequence[str] | None) -> str:
    """A reply before the first of the stop texts."""
    stops = [until] if isinstance(until, str) else list(until or [])
    places = [reply.find(stop) for stop in stops if stop and stop in reply]
    return reply[: min(places)] if places else reply
