"""Connectors whose body is a Qwen2.5 language model with causality off: HieraQuery's and Ming-Lite-Uni's.

Source: HieraQuery, Sec. 4.2 (Qwen2.5-0.5B, two-layer MLPs where widths differ); Ming-Lite-Uni's release.

B batch, N query states, D width of the MLLM, W width of the body (896), C condition width of the decoder.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Model

from diptych.core.errors import UserError, unknown
from diptych.core.schema import read
from diptych.parts.backbones.published import read_config, read_model, without_origin
from diptych.parts.conditioners.base import Connector
from diptych.parts.layers import init_xavier

OLD_KEYS = ("rope_theta", "rope_scaling", "torch_dtype")
"""Keys of published configurations that current config classes no longer list."""


class Qwen2Body(nn.Module):
    """The layers and the final norm of a Qwen2 model, every token seeing every other; no embedding table.

    Positions count 0 ... N - 1. Qwen2.5-0.5B's body has 357.9M parameters. Weight names are those of the published
    checkpoint without "model.".
    """

    def __init__(self, model: Qwen2Model) -> None:
        super().__init__()
        config: Any = model.config
        self.width: int = config.hidden_size
        self.values = without_origin(config.to_dict())
        self.layers = model.layers
        self.norm = model.norm
        self.rotary = model.rotary_emb

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Qwen2Body:
        """Random weights, by transformers' own initialisation; also on the meta device.

        Raises:
            UserError: a key that Qwen2Config does not have, or a value it refuses.
        """
        known = Qwen2Config().to_dict()
        for key in config:
            if key not in known and key not in OLD_KEYS:
                raise unknown("key", key, known, "qwen2 connector")
        try:
            built = Qwen2Config.from_dict({**config, "vocab_size": 1, "pad_token_id": None})
        except (StrictDataclassError, ValueError, TypeError) as error:
            raise UserError(f"qwen2 connector: {' '.join(str(error).split())}") from error
        return cls(Qwen2Model._from_config(built, attn_implementation="sdpa"))

    @classmethod
    def from_pretrained(cls, source: str | Path, dtype: torch.dtype = torch.float32) -> Qwen2Body:
        """The body of a published Qwen2 or Qwen2.5 (folder or hub id); safetensors only."""
        name, config = read_config(source, Qwen2Config, "Qwen2", "Qwen/Qwen2.5-0.5B")
        whole: Any = read_model(Qwen2ForCausalLM, source, name, config, dtype)
        return cls(whole.model)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, W) to (B, N, W)."""
        places = torch.arange(x.shape[1], device=x.device)[None]
        turns = self.rotary(x, places)
        for layer in self.layers:
            x = layer(x, attention_mask=None, position_ids=places, position_embeddings=turns, is_causal=False)
        return self.norm(x)


@dataclass(frozen=True, kw_only=True)
class Qwen2ConnectorConfig:
    """width: D. out: C. body: configuration of the Qwen2 model."""

    width: int
    out: int
    body: dict[str, Any]


class Qwen2Bodied(Connector):
    """A connector around a body that may be published as a language model, while what stands around it starts at
    random. So a saved model holds the whole of it."""

    whole = False

    def __init__(self, config: Any, body: Qwen2Body | None = None) -> None:
        super().__init__()
        self.config = config
        self.body = Qwen2Body.from_config(config.body) if body is None else body

    @classmethod
    def of_published(cls, values: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
        return {**config, "body": dict(values)}

    @classmethod
    def from_pretrained(cls, folder: Path, config: Mapping[str, Any] | None = None) -> Self:
        body = Qwen2Body.from_pretrained(folder)
        return cls(read(cls.Config, {**(config or {}), "body": body.values}, "connector.config"), body)


class Qwen2Connector(Qwen2Bodied):
    """HieraQuery's connector: query states (B, N, D) to condition tokens (B, N, C).

    A two-layer MLP (Linear, SiLU, Linear, at the wider of both widths) stands wherever widths differ; the identity
    where they agree.
    """

    Config = Qwen2ConnectorConfig

    def __init__(self, config: Qwen2ConnectorConfig, body: Qwen2Body | None = None) -> None:
        super().__init__(config, body)
        self.proj_in = bridge(config.width, self.body.width)
        self.proj_out = bridge(self.body.width, config.out)
        for part in (self.proj_in, self.proj_out):
            init_xavier(part)

    def forward(self, states: Tensor) -> Tensor:
        return self.proj_out(self.body(self.proj_in(states)))


class MingHead(nn.Module):
    """Linear, layer norm, ReLU, Linear, layer norm: what stands before Ming-Lite-Uni's diffusion transformer."""

    def __init__(self, width: int, hidden: int, out: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.layer_norm1 = nn.LayerNorm(hidden)
        self.fc2 = nn.Linear(hidden, out)
        self.layer_norm2 = nn.LayerNorm(out)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer_norm2(self.fc2(F.relu(self.layer_norm1(self.fc1(x)))))


@dataclass(frozen=True, kw_only=True)
class MingConnectorConfig(Qwen2ConnectorConfig):
    """hidden: inner width of the head (2048 in the release)."""

    hidden: int = 2048


class MingConnector(Qwen2Bodied):
    """Ming-Lite-Uni's connector: Linear, body, Linear back to D, unit length, then `MingHead`.

    Weight names are those of the release below `proj_in`, `proj_out` and `mlp`.
    """

    Config = MingConnectorConfig

    def __init__(self, config: MingConnectorConfig, body: Qwen2Body | None = None) -> None:
        super().__init__(config, body)
        self.proj_in = nn.Linear(config.width, self.body.width)
        self.proj_out = nn.Linear(self.body.width, config.width)
        self.mlp = MingHead(config.width, config.hidden, config.out)
        for part in (self.proj_in, self.proj_out, self.mlp):
            init_xavier(part)

    def forward(self, states: Tensor) -> Tensor:
        return self.mlp(F.normalize(self.proj_out(self.body(self.proj_in(states))), dim=-1))

    def null(self, states: Tensor) -> Tensor:
        """The release's condition of guidance: the head applied to zeros of the states' shape (B, N, C)."""
        return self.mlp(torch.zeros_like(states))


def bridge(width: int, out: int) -> nn.Module:
    """A two-layer MLP from `width` to `out`, the identity where they agree."""
    if width == out:
        return nn.Identity()
    inner = max(width, out)
    return nn.Sequential(nn.Linear(width, inner), nn.SiLU(), nn.Linear(inner, out))
