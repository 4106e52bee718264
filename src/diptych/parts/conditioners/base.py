"""One interface over conditioners, which a frozen MLLM reads beyond its prompt, and one over connectors behind it."""

from __future__ import annotations

import abc

import torch
from torch import Tensor, nn

from diptych.checkpoints.deferred import active
from diptych.core.errors import UserError
from diptych.parts.backbones.base import Backbone
from diptych.parts.part import Part


class Conditioner(Part, abc.ABC):
    """Gives the tokens appended after the prompt before the MLLM runs.

    count: number of appended tokens Q (0 for `raw`).
    """

    count: int

    def places(self) -> Tensor | None:
        """Rotary positions (Q, 3) of the appended tokens, counted from the first; None where they count on."""
        return None

    @abc.abstractmethod
    def forward(self, sequence: Tensor, mask: Tensor) -> Tensor:
        """Input embeddings of the prompt (B, L, D) and mask (B, L) to the tokens to append (B, Q, D)."""

    def start(self, backbone: Backbone) -> None:
        """What random weights take over from the MLLM that they stand beside; nothing where this is not overridden."""


class Connector(Part, abc.ABC):
    """States of the MLLM (B, N, D) to condition tokens (B, N, C).

    Its `Config` has `width`, which is D, and `out`, which is C.
    """

    @abc.abstractmethod
    def forward(self, states: Tensor) -> Tensor:
        """(B, N, D) to (B, N, C)."""


@torch.no_grad()
def start_queries(queries: nn.Parameter, text: str | None, backbone: Backbone) -> None:
    """Learned queries (Q, D) as the MLLM's embeddings of a text of Q tokens; unchanged where there is no text.

    Raises:
        UserError: a text of another number of tokens.
    """
    if text is None or (queries.is_meta and active() is None):
        return
    ids = backbone.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"][0]
    if len(ids) != len(queries):
        raise UserError(f"conditioner: init_text is {len(ids)} tokens, for {len(queries)} queries")
    queries.copy_(backbone.embed(ids[None])[0])
