"""A conversation with a model: it keeps its history, shows images, and may be read as it is written."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from diptych.core.sample import IMAGE_PLACEHOLDER, Message
from diptych.core.tokens import likeliest
from diptych.data.imaging import AnyImage, as_image, to_tensor
from diptych.inference.arguments import texts
from diptych.systems.base import System


@dataclass
class Chat:
    """A conversation; `Engine.chat` begins one.

    history: the turns so far, in which `<image>` stands for the images in their order. images: those images, each
    (3, H, W) in [-1, 1]. max_new_tokens: longest answer.
    """

    system: System
    history: list[Message] = field(default_factory=list[Message])
    images: list[Tensor] = field(default_factory=list[Tensor])
    max_new_tokens: int = 256

    def say(self, text: str, *images: AnyImage) -> str:
        """The answer to a further turn, which may show images; both are then part of the history."""
        return "".join(self.stream(text, *images))

    def stream(self, text: str, *images: AnyImage) -> Generator[str]:
        """The same, piece by piece as it is written. The turn is part of the history once the last piece was read.

        Raises:
            UserError: no text, or a conversation that is longer than the model takes.
        """
        texts(text, "turn")
        turn = Message(role="user", text=f"{IMAGE_PLACEHOLDER}\n" * len(images) + text)
        history = [*self.history, turn]
        shown = [*self.images, *(to_tensor(as_image(image)) for image in images)]
        said = ""
        for piece in written(self.system, history, shown, self.max_new_tokens):
            said += piece
            yield piece
        self.history = [*history, Message(role="assistant", text=said)]
        self.images = shown

    def __repr__(self) -> str:
        """Its turns, one a line."""
        return "\n".join(f"{message.role}: {message.text}" for message in self.history) or "Chat()"


def written(system: System, history: Sequence[Message], images: Sequence[Tensor], longest: int) -> Iterator[str]:
    """The pieces of the assistant's next turn, greedily; together they are what `System.generate_text` gives.

    The model writes in a thread of its own. A piece comes once later tokens can no longer change it: a word's bytes may
    be spread over several.
    """
    pieces: queue.Queue[str | BaseException | None] = queue.Queue()
    stop = threading.Event()
    tokenizer: Any = system.tokenizer
    ids: list[int] = []
    sent = ""

    def choose(logits: Tensor, step: int) -> Tensor:
        nonlocal sent
        if stop.is_set():
            raise InterruptedError
        # The next token, and what of the text can no longer change.
        chosen = likeliest(logits, step)
        ids.append(int(chosen[0]))
        text = str(tokenizer.decode(ids, skip_special_tokens=True)).lstrip()
        whole = text.rstrip("\N{REPLACEMENT CHARACTER}").rstrip()
        if whole.startswith(sent) and len(whole) > len(sent):
            pieces.put(whole[len(sent) :])
            sent = whole
        return chosen

    def write() -> None:
        try:
            shown = [image.to(system.device) for image in images]
            with torch.no_grad():
                (answer,) = system.generate_text([history], [shown], max_new_tokens=longest, choose=choose)
            if answer.startswith(sent):
                pieces.put(answer[len(sent) :])
        except BaseException as error:  # handed to the reader, whatever it is
            pieces.put(error)
        pieces.put(None)

    # Pieces are handed on as they come; leaving early stops the writer at its next token.
    thread = threading.Thread(target=write, daemon=True)
    thread.start()
    try:
        while (piece := pieces.get()) is not None:
            if isinstance(piece, BaseException):
                raise piece
            if piece:
                yield piece
    finally:
        stop.set()
        thread.join()
