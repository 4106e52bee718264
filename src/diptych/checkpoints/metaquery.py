"""MetaQuery's published checkpoints: their key names and ours, as data.

Published names begin with `model.mllm_backbone` (Qwen2.5-VL in its layout before or since transformers 4.52),
`model.connector`, and, with or without `model.`, `transformer` and `vae` (both as in diffusers). Queries and marks are
the last rows of the MLLM's embedding table: after V original rows the begin mark, the end mark, and the queries.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from diptych.checkpoints.tensors import (
    load_into,
    own_tensors,
    read_tensors,
    refuse_pickle,
    released_tensors,
    swap_prefix,
)
from diptych.core.errors import UserError

KEYS: tuple[tuple[str, str], ...] = (
    ("model.connector.0.", "connector."),
    ("model.connector.1.", "connector.linear_in."),
    ("model.connector.3.", "connector.linear_out."),
    ("model.connector.4.", "connector.norm."),
    ("model.mllm_backbone.visual.", "backbone.model.model.visual."),
    ("model.mllm_backbone.lm_head.", "backbone.model.lm_head."),
    ("model.mllm_backbone.model.", "backbone.model.model.language_model."),
    ("model.transformer.", "decoder.model."),
    ("model.vae.", "autoencoder.model."),
)
"""Beginnings of published names and of ours, one to one; the first that fits counts."""

OTHER_KEYS: tuple[tuple[str, str], ...] = (
    ("model.mllm_backbone.model.language_model.", "backbone.model.model.language_model."),
    ("model.mllm_backbone.model.visual.", "backbone.model.model.visual."),
    ("transformer.", "decoder.model."),
    ("vae.", "autoencoder.model."),
)
"""Other published names of the same weights."""

TABLE = "backbone.model.model.language_model.embed_tokens.weight"
QUERIES, STARTS, ENDS = "conditioner.queries.0", "conditioner.starts", "conditioner.ends"
OPTIONAL = ("backbone", "decoder", "autoencoder", "projector")
"""Parts that a checkpoint may leave out as a whole: they have weights of their own."""


def to_ours(tensors: Iterable[tuple[str, Tensor]], rows: int) -> Iterator[tuple[str, Tensor]]:
    """Published names and tensors as ours; a name that MetaQuery does not have comes through unchanged.

    Args:
        rows: V, rows of the MLLM's own embedding table.
    """
    for name, tensor in tensors:
        ours = swap_prefix(name, (*OTHER_KEYS, *KEYS))
        if ours != TABLE or tensor.shape[0] <= rows:
            yield ours, tensor
            continue
        yield TABLE, tensor[:rows]
        yield STARTS, tensor[rows : rows + 1]
        yield ENDS, tensor[rows + 1 : rows + 2]
        yield QUERIES, tensor[rows + 2 :]


def to_published(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The inverse of `to_ours`, for export; table, marks and queries must all be there."""
    back = [(ours, published) for published, ours in KEYS]
    back.sort(key=lambda pair: -len(pair[0]))  # "connector.norm." before "connector."
    table: dict[str, Tensor] = {}
    for name, tensor in tensors:
        if name in (TABLE, STARTS, ENDS, QUERIES):
            table[name] = tensor
            if len(table) == 4:
                yield swap_prefix(TABLE, back), torch.cat([table[key] for key in (TABLE, STARTS, ENDS, QUERIES)])
        else:
            yield swap_prefix(name, back), tensor
    assert len(table) in (0, 4), "table, marks and queries go together"


def load_metaquery(system: nn.Module, file: Path) -> None:
    """Weights of a checkpoint with MetaQuery's key names into a hieraquery system of MetaQuery's parts, strictly.

    Raises:
        UserError: a pickle file, an unreadable one, a system of other parts, or keys and shapes that do not fit.
    """
    refuse_pickle(file)
    if not file.is_file():
        raise UserError(f"{file}: no such file")
    parameters = own_tensors(system)
    for name in (TABLE, STARTS, ENDS, QUERIES, "connector.linear_in.weight"):
        if name not in parameters:
            raise UserError(
                f"{file}: a checkpoint of MetaQuery needs its parts (qwen2_5_vl, hierarchical_queries of one scale "
                f"with markers, connector metaquery), as in recipe metaquery/sana; this system has no {name}"
            )
    seen: set[str] = set()

    def noted() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in to_ours(read_tensors([file]), parameters[TABLE].shape[0]):
            seen.add(name.split(".")[0])
            yield name, tensor

    def left_out(name: str) -> bool:
        part = name.split(".")[0]
        return part in OPTIONAL and part not in seen

    load_into(system, noted(), str(file), optional=left_out)


def metaquery_tensors(system: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The weights of a hieraquery system of MetaQuery's parts under MetaQuery's key names."""
    return to_published(released_tensors(system).items())
