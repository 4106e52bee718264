"""Texts of many requests, token by token: every row has its own keys and values and its own way to choose, and the rows
of one model are one batch whatever their lengths.

Systems whose language model is a `Backbone` are batched. BAGEL, whose cache is its own, writes in a thread that gets
its turn once a round: one token of each of its requests, one after the other.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from diptych.core.errors import UserError
from diptych.core.sample import Message
from diptych.core.tokens import NextToken
from diptych.inference.engine import Engine
from diptych.parts.backbones.answers import answer_budget
from diptych.parts.backbones.base import Backbone, Prefix
from diptych.parts.backbones.causal import KeyValues, cut
from diptych.serving.drawing import number_format
from diptych.serving.jobs import Written
from diptych.systems.composed import ComposedSystem
from diptych.systems.mllm import MLLMSystem

Piece = Callable[[str], None]


class Answer:
    """The text of a row as it grows: pieces that no later token changes, and where it stops."""

    def __init__(self, decode: Callable[[list[int]], str], stop: Sequence[str], tell: Piece | None) -> None:
        self.decode, self.stop, self.tell = decode, tuple(stop), tell
        self.ids: list[int] = []
        self.sent = ""
        self.text = ""
        self.stopped = False

    def add(self, token: int) -> None:
        """A further token."""
        self.ids.append(token)
        self.text = self.decode(self.ids)
        places = [place for text in self.stop if (place := self.text.find(text)) >= 0]
        if places:
            self.text, self.stopped = self.text[: min(places)], True
        self._send(self.text if self.stopped else self._settled())

    def end(self) -> str:
        """The whole text; its last piece is told."""
        self._send(self.text)
        return self.text

    def _settled(self) -> str:
        """What stays, whatever follows: no part of a character, no space at the end, no beginning of a stop text."""
        whole = self.text.rstrip("\N{REPLACEMENT CHARACTER}").rstrip()
        held_back = max((n for text in self.stop for n in range(1, len(text)) if whole.endswith(text[:n])), default=0)
        return whole[: len(whole) - held_back]

    def _send(self, text: str) -> None:
        if self.tell is not None and text.startswith(self.sent) and len(text) > len(self.sent):
            self.tell(text[len(self.sent) :])
            self.sent = text


class Row:
    """One answer that is being written by a batched model.

    Raises:
        UserError: a conversation that leaves no room to answer in.
    """

    def __init__(
        self,
        engine: Engine,
        conversation: Sequence[Message],
        images: Sequence[Tensor],
        *,
        max_new_tokens: int,
        choose: NextToken,
        stop: Sequence[str] = (),
        tell: Piece | None = None,
    ) -> None:
        system: Any = engine.system
        backbone: Backbone = system.backbone
        chat: Any = getattr(backbone, "chat")  # noqa: B009 - every causal backbone keeps its conversation's form there
        self.choose = choose
        self.answer = Answer(lambda ids: str(chat.decode(ids)), stop, tell)
        self.ends = set(chat.end_ids)
        self.done = False
        self.finish: Literal["stop", "length"] = "length"
        # The prompt is read once, alone; its keys and values are what later tokens continue.
        cuts = isinstance(system, ComposedSystem) and system.options.too_long == "cut"
        device = system.device
        shown = [image.to(device) for image in images]
        with torch.no_grad(), number_format(engine):
            sequences = backbone.tokenize([conversation], images=[shown], generate=True, whole=not cuts)
            vision = backbone.vision_tokens(shown)
            embeddings = backbone.place(backbone.embed(sequences.ids), sequences.images, vision)
            if cuts:
                keep = backbone.max_length - max_new_tokens
                if keep < 1:
                    raise UserError(f"max_tokens {max_new_tokens}: the MLLM takes {backbone.max_length} tokens in all")
                sequences, embeddings = cut(sequences, embeddings, keep, "last")
            self.prompt_tokens = int(sequences.mask.sum())
            self.budget = answer_budget(backbone, self.prompt_tokens, max_new_tokens)
            state = backbone.run(embeddings, sequences.mask, positions=sequences.positions, cache=True)
            self.hidden = state.hidden[:, self.prompt_tokens - 1]  # (1, D)
        assert isinstance(state.cache, KeyValues), "causal backbones keep KeyValues"
        self.cache: KeyValues | None = state.cache  # until the row joins a batch

    def take(self, logits: Tensor) -> int:
        """The next token by logits (1, V); `done` says whether it was the last."""
        token = int(self.choose(logits, len(self.answer.ids))[0])
        if token in self.ends:
            self.done, self.finish = True, "stop"
            return token
        self.answer.add(token)
        if self.answer.stopped:
            self.done, self.finish = True, "stop"
        elif len(self.answer.ids) >= self.budget:
            self.done = True
        return token

    def written(self) -> Written:
        """The answer, once done."""
        return Written(
            text=self.answer.end(),
            finish=self.finish,
            prompt_tokens=self.prompt_tokens,
            tokens=len(self.answer.ids),
        )


class TextBatch:
    """The rows of one model that are being written."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.rows: list[Row] = []
        self.cache: KeyValues | None = None
        self.hidden: Tensor | None = None  # (rows, D)

    def add(self, row: Row) -> None:
        """A row whose prompt was read."""
        assert row.cache is not None
        if self.cache is None or self.hidden is None:
            self.cache, self.hidden = row.cache, row.hidden
        else:
            self.cache, self.hidden = self.cache.join([row.cache]), torch.cat([self.hidden, row.hidden])
        self.rows.append(row)
        row.cache = None

    def drop(self, gone: Sequence[Row]) -> None:
        """Rows that are cancelled or done."""
        if not gone:
            return
        kept = [place for place, row in enumerate(self.rows) if row not in gone]
        if len(kept) == len(self.rows):
            return
        self.rows = [self.rows[place] for place in kept]
        if not kept or self.cache is None or self.hidden is None:
            self.cache, self.hidden = None, None
        else:
            self.cache, self.hidden = self.cache.take(kept), self.hidden[kept]

    @torch.no_grad()
    def step(self) -> list[Row]:
        """One token more of every row; the rows that are done, which are dropped."""
        if not self.rows:
            return []
        system: Any = self.engine.system
        backbone: Backbone = system.backbone
        with number_format(self.engine):
            # Each row chooses from its own logits.
            assert self.hidden is not None
            logits = backbone.logits(self.hidden)  # (B, V)
            tokens = [row.take(logits[place : place + 1]) for place, row in enumerate(self.rows)]
            done = [row for row in self.rows if row.done]
            kept = [token for token, row in zip(tokens, self.rows, strict=True) if not row.done]
            self.drop(done)
            # What was chosen is read, by all that go on.
            if self.rows and self.hidden is not None:
                new = torch.tensor(kept, device=system.device)[:, None]  # (B, 1)
                ones = torch.ones(new.shape, dtype=torch.bool, device=new.device)
                before = (
                    Prefix(hidden=self.hidden[:, None], mask=ones, cache=self.cache)
                    if self.hidden is not None
                    else None
                )
                state = backbone.run(backbone.embed(new), ones, before, cache=True)
                self.cache, self.hidden = state.cache, state.hidden[:, 0]
        return done


def is_batched(engine: Engine) -> bool:
    """Whether the texts of a model are written as one batch."""
    return isinstance(engine.system, ComposedSystem | MLLMSystem)


class Turns:
    """A text that a system writes in one call, made to wait after each token until it is given a turn.

    Args:
        write: the call; it is given a `choose` that waits.
        choose: how the next token is chosen.
    """

    def __init__(self, write: Callable[[NextToken], Any], choose: NextToken) -> None:
        self.result: Any = None
        self.error: BaseException | None = None
        self.done = False
        self.cancelled = False
        self.count = 0
        self._go, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self._write, self._choose = write, choose
        self._thread = threading.Thread(target=self._run, daemon=True, name="diptych-text")
        self._thread.start()

    def turn(self) -> None:
        """Let it write one token more."""
        self._go.release()
        self._back.acquire()

    def close(self) -> None:
        """End it."""
        while not self.done:
            self.cancelled = True
            self.turn()

    def _pause(self, logits: Tensor, step: int) -> Tensor:
        chosen = self._choose(logits, step)
        self.count += 1
        self._back.release()
        self._go.acquire()
        if self.cancelled:
            raise InterruptedError
        return chosen

    def _run(self) -> None:
        self._go.acquire()
        try:
            if not self.cancelled:
                with torch.no_grad():
                    self.result = self._write(self._pause)
        except BaseException as error:  # handed to the scheduler, whatever it is
            self.error = error
        self.done = True
        self._back.release()
