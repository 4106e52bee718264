"""Hidden states of a prompt and of the tokens a conditioner appends to it, with the prompt run once."""

from __future__ import annotations

import torch
from torch import Tensor

from diptych.core.errors import UserError
from diptych.core.host import on_host, upload
from diptych.parts.backbones.base import Backbone
from diptych.parts.conditioners.base import Conditioner


def condition_states(
    backbone: Backbone,
    conditioner: Conditioner,
    embeddings: Tensor,
    mask: Tensor,
    *,
    positions: Tensor | None = None,
    places: Tensor | None = None,
    layers: int = 1,
    reuse: bool = True,
) -> tuple[Tensor, Tensor]:
    """Last hidden states of prompt and appended tokens.

    The language model is causal and the appended tokens come last, so the prompt's states do not depend on them. With
    `reuse` the prompt runs once without gradient and its keys and values are continued; only the Q appended tokens are
    back-propagated. States and gradients are those of the plain run. The conditioner gets the prompt's embeddings
    as constants: gradients reach it through its output alone.

    B batch, L prompt tokens, Q appended tokens, D width.

    Args:
        embeddings: (B, L, D) input embeddings of the prompt, right-padded.
        mask: (B, L) bool.
        positions: (B, L, 3) as `Sequences` has them, where the language model needs them.
        places: (Q, 3) positions of the appended tokens, counted from the prompt's next one, for language models whose
            positions have axes; None where they count on.
        layers: so many last layers' states stand side by side, the last one first.
        reuse: False for one plain run over L + Q tokens, through which gradients also reach `embeddings` and the
            language model where they are wanted.

    Returns:
        States (B, L + Q, layers D) and their mask (B, L + Q).

    Raises:
        UserError: `reuse` while gradients of the language model or of the embeddings are wanted; they would be lost.
    """
    count = conditioner.count
    added = torch.ones((mask.shape[0], count), dtype=torch.bool)
    whole = upload(torch.cat([on_host(mask), added], dim=1), mask.device)  # (B, L + Q)
    added = upload(added, mask.device)
    if places is not None:
        places = upload(places, mask.device).expand(mask.shape[0], -1, -1)  # (B, Q, 3)
    if not reuse:
        if places is not None:
            positions = _whole_positions(mask, positions, places)
        appended = conditioner(embeddings, mask).to(embeddings.dtype)  # (B, Q, D)
        sequence = torch.cat([embeddings, appended], dim=1)
        return backbone.run(sequence, whole, positions=positions, layers=layers).hidden, whole

    _refuse_lost_gradients(backbone, embeddings)
    with torch.no_grad():
        prefix = backbone.run(embeddings, mask, positions=positions, cache=count > 0, layers=layers)
    if count == 0:
        return prefix.hidden, whole

    appended = conditioner(embeddings, mask).to(embeddings.dtype)  # (B, Q, D)
    states = backbone.run(appended, added, prefix, positions=places, layers=layers).hidden
    return torch.cat([prefix.hidden, states], dim=1), whole


def _whole_positions(mask: Tensor, positions: Tensor | None, places: Tensor) -> Tensor:
    """Positions (B, L + Q, 3) of prompt and appended tokens in one plain run."""
    if positions is None:
        positions = (mask.long().cumsum(1) - 1).clamp(min=0)[..., None].expand(-1, -1, 3)
    after = positions.amax((1, 2), keepdim=True) + 1  # (B, 1, 1)
    return torch.cat([positions, places + after], dim=1)


def _refuse_lost_gradients(backbone: Backbone, embeddings: Tensor) -> None:
    if not torch.is_grad_enabled():
        return
    if embeddings.requires_grad:
        raise UserError("prefix reuse gives no gradient to the prompt's embeddings; use reuse=False or detach them")
    reader = backbone.named_parts().get("llm", backbone)
    if any(parameter.requires_grad for parameter in reader.parameters()):
        raise UserError("prefix reuse needs a frozen language model; freeze `llm` or use reuse=False")
