"""States of an MLLM that were prepared of an item's requests, read one by one as visits ask for them.

An item's tensors are the digests of its requests (R,), int64, and the states (N, W) of each. Requests that several
items share, such as the one without a text, lie in a shard once.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from diptych.core.errors import UserError
from diptych.data.prepared_files import PreparedSet


@dataclass(frozen=True)
class ItemStates:
    """Of one item of a set. id: of its samples, for messages."""

    made: PreparedSet
    index: int
    id: str

    def __call__(self, digest: int) -> Tensor:
        """The states (N, W) of a request, float32; UserError where it was not prepared."""
        shard, place = self.made.place(self.index)
        known: list[int] = shard.tensor(place, 0).tolist()
        if digest not in known:
            raise UserError(
                f"{self.id}: no states of what it asks in {self.made.folder}; its words or the model's tokenizer have "
                "changed since, run diptych prepare again"
            )
        return shard.tensor(place, 1 + known.index(digest)).float()
