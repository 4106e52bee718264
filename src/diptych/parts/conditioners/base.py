"""One interface over conditioners: what is asked of a frozen MLLM beyond its prompt."""

from __future__ import annotations

import abc

from torch import Tensor, nn


class Conditioner(nn.Module, abc.ABC):
    """Gives the tokens appended after the prompt before the MLLM runs.

    count: number of appended tokens Q (0 for `raw`).
    """

    count: int

    @abc.abstractmethod
    def forward(self, sequence: Tensor, mask: Tensor) -> Tensor:
        """Input embeddings of the prompt (B, L, D) and mask (B, L) to the tokens to append (B, Q, D)."""
