"""OmniGen2's joint sequences through their blocks: padded rows of any lengths, of which some tokens may skip blocks.

B samples, T tokens of a sequence, the last N of them the image to make, W hidden width, K head width, E time width.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from diptych.core.host import on_host
from diptych.parts.decoders.omnigen2_layout import real
from diptych.parts.decoders.routing import TokenRoute


def run_joint(
    blocks: Iterable[nn.Module],
    rows: list[Tensor],
    turns: Sequence[Tensor],
    counts: Sequence[int],
    time: Tensor,
    layer: int | None,
    route: TokenRoute | None,
) -> tuple[list[Tensor], list[Tensor]]:
    """Sequences through the blocks.

    Args:
        rows: each (T, W). turns: each (T, K / 2). counts: N of each. time: (B, 1, E). layer, route: as of
            `Decoder.denoise_training`.

    Returns:
        The sequences behind the last block, and those after block `layer` where one is given; of tokens that skip it
        those before it.
    """
    states: list[Tensor] = []
    away, lengths = rows, [len(row) for row in rows]
    x, turn, mask = padded(rows, turns)
    for number, block in enumerate(blocks, start=1):
        if route is not None and number == route.first:
            away = [row[:length] for row, length in zip(x, lengths, strict=True)]
            kept = route.leave_rows(away, counts)
            x, turn, mask = padded(kept, route.leave_rows(turns, counts))
            lengths = [len(row) for row in kept]
        x = block(x, turn, mask, time)
        if number == layer:
            states = [row[:length] for row, length in zip(x, lengths, strict=True)]
            if route is not None and route.inside(number):
                states = route.rejoin_rows(states, away, counts)
        if route is not None and number == route.last:
            made = route.rejoin_rows([row[:length] for row, length in zip(x, lengths, strict=True)], away, counts)
            x, turn, mask = padded(made, turns)
            lengths = [len(row) for row in made]
    return [row[:length] for row, length in zip(x, lengths, strict=True)], states


def padded(rows: Sequence[Tensor], turns: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor | None]:
    """Rows (B, T, W), turns (B, T, K / 2) and the mask of attention over them."""
    mask = real([len(row) for row in rows], rows[0].device)
    return pad_sequence(list(rows), batch_first=True), pad_sequence(list(turns), batch_first=True), attention_keys(mask)


def attention_keys(mask: Tensor) -> Tensor | None:
    """(B, T) bool as an attention mask (B, 1, 1, T); None where nothing is padded."""
    if bool(on_host(mask).all()):
        return None
    return mask[:, None, None]
