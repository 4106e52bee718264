"""Caches, guided sampling with every renormalisation, and text decoding, as the reference has them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from bagel_golden import Golden, close
from torch import Tensor, nn

from diptych.core.condition import Condition
from diptych.core.patchify import patchify, unpatchify
from diptych.core.positions import grid_ids
from diptych.core.sample import Batch, Sample
from diptych.inference.bagel_guidance import BagelGuidance
from diptych.inference.guidance import Branch, guided
from diptych.inference.solvers import times
from diptych.systems.bagel.answer import write
from diptych.systems.bagel.context import (
    CacheCondition,
    Context,
    ContextStore,
    Piece,
    condition,
    empty_context,
    latent_piece,
    read,
    text_piece,
    vision_piece,
)
from diptych.systems.bagel.network import BagelNetwork
from diptych.systems.branches import joined

IMAGES = Golden("generate_image")
TEXTS = Golden("generate_text")
NETWORKS = {"image": IMAGES.network(), "text": TEXTS.network()}


def image_pieces(golden: Golden, network: BagelNetwork, number: int, *, draw: bool) -> list[Piece]:
    grids = golden.data["images"][number]
    patches = network.vision.patches(golden[f"inputs.image.{number}.vit_pixels"])
    seen = vision_piece(patches, *grids["vit_grid"])
    if not draw:
        return [seen]
    tokens = patchify(golden[f"inputs.image.{number}.latent"][None], 2, "pqc")[0]
    return [latent_piece(tokens, *grids["latent_grid"]), seen]


def pieces(golden: Golden, network: BagelNetwork, items: Sequence[int | str], *, draw: bool) -> list[Piece]:
    found: list[Piece] = []
    for item in items:
        if isinstance(item, int):
            found += image_pieces(golden, network, item, draw=draw)
        else:
            found.append(text_piece(golden.data["prompts"][item]))
    return found


def text_free(items: Sequence[int | str]) -> Sequence[int | str]:
    """What was read before the last text, or up to the last image where that came later."""
    return items[:-1] if isinstance(items[-1], str) else items


def branches(name: str) -> dict[str, Context]:
    items = IMAGES.data["contexts"][name]["items"]
    texts = [item for item in items if isinstance(item, str)]
    network = NETWORKS["image"]
    requests = {"main": items, "text_free": text_free(items), "image_free": texts}
    store = ContextStore(10_000)
    asked = [pieces(IMAGES, network, request, draw=True) for request in requests.values()]
    with torch.no_grad():
        found = [store.contexts(network, IMAGES.markers(), [request])[0] for request in asked]
    assert store.reused_tokens >= found[1].length  # the text-free request is a part of the main one
    return dict(zip(requests, found, strict=True))


@pytest.mark.parametrize("name", IMAGES.data["contexts"])
def test_caches_of_the_three_branches(name: str) -> None:
    for branch, context in branches(name).items():
        expected = IMAGES.data["kv_cache"][name][branch]
        assert (context.length, context.position) == (expected["cached_tokens"], expected["query_rope_id"])
        ids = IMAGES[f"steps.context.{name}.{branch}.query_position_ids"]
        assert bool((ids == context.position).all())
        for layer in range(2 if context.length else 0):
            prefix = f"steps.context.{name}.{branch}.cache_"
            close(context.layers[layer][0], IMAGES[f"{prefix}k.layer{layer}"])
            close(context.layers[layer][1], IMAGES[f"{prefix}v.layer{layer}"])


class Velocities(nn.Module):
    """A system as guidance sees it; counts the rows it runs."""

    def __init__(self, grid: tuple[int, int]) -> None:
        super().__init__()
        self.grid, self.rows = grid, 0

    def velocity(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        assert isinstance(condition, CacheCondition)
        self.rows += len(x)
        network = NETWORKS["image"]
        places = grid_ids(*self.grid, network.config.latent_side)
        tokens = patchify(x, 2, "pqc")
        out = network.query(tokens, t, places, condition.starts, IMAGES.markers(), condition.layers, condition.lengths)
        return unpatchify(out, 2, "pqc", *self.grid)


@pytest.mark.parametrize("name", IMAGES.data["runs"])
@torch.no_grad()
def test_guided_sampling(name: str) -> None:
    run: dict[str, Any] = IMAGES.data["runs"][name]
    grid = tuple(IMAGES.data["contexts"][run["context"]]["target_grid"])
    guidance = BagelGuidance(
        text=run["cfg_text_scale"],
        images=run["cfg_img_scale"],
        interval=tuple(run["cfg_interval"]),
        renorm=run["cfg_renorm_type"],
        renorm_min=run["cfg_renorm_min"],
        patch=2,
    )
    held = {key: condition([context]) for key, context in branches(run["context"]).items()}
    names: dict[Branch, str] = {"full": "main", "image": "text_free", "text": "image_free"}
    compared = guidance.branches(Batch((Sample(id="a", task="text_to_image", text="a"),)))
    system = Velocities((grid[0], grid[1]))
    velocity = guided(joined(system.velocity, [held[names[branch]] for branch in compared]), compared, guidance)
    schedule = times(run["num_timesteps"] - 1, run["timestep_shift"])
    close(schedule, IMAGES[f"steps.{name}.schedule"])
    x = unpatchify(IMAGES[f"inputs.{run['context']}.noise"][None], 2, "pqc", *grid)
    for step, (now, after) in enumerate(pairwise(schedule)):
        close(patchify(x, 2, "pqc")[0], IMAGES[f"steps.{name}.x_t"][step], 1e-4)
        before = system.rows
        v = velocity(x, now[None])
        counted = IMAGES.data["branches_per_step"][name][step]
        assert system.rows - before == (counted if guidance.text > 1 else 1)
        close(patchify(v, 2, "pqc")[0], IMAGES[f"steps.{name}.velocity"][step], 1e-4)
        x = x + (after - now) * v
    close(patchify(x, 2, "pqc")[0], IMAGES[f"outputs.{name}.latent_tokens"], 1e-4)
    close(x[0], IMAGES[f"outputs.{name}.latent_chw"], 1e-4)


def text_context(items: Sequence[int | str]) -> Context:
    network = NETWORKS["text"]
    with torch.no_grad():
        return read(network, TEXTS.markers(), [empty_context(network)], [pieces(TEXTS, network, items, draw=False)])[0]


@pytest.mark.parametrize("name", TEXTS.data["cases"])
def test_text_is_written_token_by_token(name: str) -> None:
    case = TEXTS.data["cases"][name]
    context = text_context(case["items"])
    prefill = TEXTS.data["prefill"][name]
    assert (context.length, context.position) == (prefill["cached_tokens"], prefill["first_query_rope_id"])
    close(context.layers[0][0], TEXTS[f"steps.{name}.cache_k.layer0"])
    close(context.layers[1][1], TEXTS[f"steps.{name}.cache_v.layer1"])
    network, markers = NETWORKS["text"], TEXTS.markers()
    written = write(network, markers, [context], max_tokens=case["max_length"], ends={-1}, keep_logits=True)
    assert written.fed[0] == TEXTS[f"outputs.{name}.token_ids"].tolist()
    close(written.logits[:, 0], TEXTS[f"outputs.{name}.logits"], 1e-4)
    stop = TEXTS.data["stop"][name]
    short = write(network, markers, [context], max_tokens=case["max_length"], ends={stop["end_token_id"]})
    assert short.fed[0] == stop["returned_ids"]


def test_two_contexts_are_read_and_continued_as_one_batch() -> None:
    network, markers, batch = NETWORKS["text"], TEXTS.markers(), TEXTS.data["batch"]
    requests = [pieces(TEXTS, network, items, draw=False) for items in batch["contexts"]]
    with torch.no_grad():
        contexts = read(network, markers, [empty_context(network)] * 2, requests)
    close(torch.cat([context.layers[0][0] for context in contexts]), TEXTS["steps.batch.cache_k.layer0"])
    written = write(network, markers, contexts, max_tokens=batch["max_length"], ends={-1}, keep_logits=True)
    assert torch.tensor(written.fed).T.tolist() == TEXTS["outputs.batch.token_ids"].tolist()
    close(written.logits, TEXTS["outputs.batch.logits"], 1e-4)
