"""Packed rows as the reference packs them: places, rotary ids, masks, targets; image sizes; rows within a budget."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bagel_golden import Golden, item, raw_times
from hypothesis import given, settings
from hypothesis import strategies as st

from diptych.core.errors import UserError
from diptych.core.image_sizes import SideRange
from diptych.core.packing import padded, rows_within, sample_mask
from diptych.parts.backbones.attention import visible
from diptych.systems.bagel.items import Pack, Tables, next_position, pack

GOLDEN = Golden("packing")
CONFIG = GOLDEN.data["config"]
TABLES = Tables(latent=CONFIG["max_latent_size"], vision=CONFIG["max_num_patch_per_side"])


def packed(samples: list[dict[str, Any]]) -> Pack:
    items = [[item(values, CONFIG) for values in sample["items"]] for sample in samples]
    return pack(items, GOLDEN.markers(CONFIG), TABLES)


@pytest.mark.parametrize("case", GOLDEN.data["cases"])
def test_rows_are_packed_as_the_reference_does(case: str) -> None:
    samples = GOLDEN.data["cases"][case]
    row = packed(samples)
    raw = raw_times(samples)
    times = row.token_times(raw.sigmoid())
    shape = [len(row.latent_grids), 3, *(16 * max(side) for side in zip(*row.latent_grids, strict=True))]
    filled = padded(row.samples, row.splits, row.modes, CONFIG["max_num_tokens"])
    got = {
        "packed_text_ids": row.text_ids,
        "packed_text_indexes": row.text_places,
        "packed_position_ids": row.positions,
        "packed_vit_token_indexes": row.vision_places,
        "packed_vit_position_ids": row.vision_ids,
        "vit_token_seqlens": torch.tensor(row.vision_lengths),
        "packed_vae_token_indexes": row.latent_places,
        "packed_latent_position_ids": row.latent_ids,
        "patchified_vae_latent_shapes": torch.tensor(row.latent_grids),
        "packed_timesteps": times.logit(),
        "ce_loss_indexes": row.learned_places,
        "packed_label_ids": row.labels,
        "ce_loss_weights": row.label_weights,
        "mse_loss_indexes": row.flow_places,
        "sample_lens": torch.tensor(row.samples),
        "split_lens": torch.tensor(row.splits),
        "attn_modes": torch.tensor(row.modes),
        "attention_mask": row.mask(),
        "padded_images_shape": torch.tensor(shape),
        **{f"padded_flex.{k}": torch.tensor(v) for k, v in zip(("sample_lens", "split_lens", "attn_modes"), filled)},  # noqa: B905
    }
    expected = GOLDEN.group(f"outputs.{case}.")
    assert len(expected) >= 16
    for name, value in expected.items():
        if value.is_floating_point():
            torch.testing.assert_close(got[name], value, rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(got[name], value), name


def test_the_mask_place_by_place_is_the_same() -> None:
    for samples in GOLDEN.data["cases"].values():
        row = packed(samples)
        sees = visible(row.layout(), torch.device("cpu"))
        place = torch.arange(row.length)
        nothing = torch.zeros(1, dtype=torch.long)
        assert torch.equal(sees(nothing, nothing, place[:, None], place[None, :]), row.mask())


def test_next_position_is_where_the_row_goes_on() -> None:
    for samples in GOLDEN.data["cases"].values():
        for sample in samples:
            items = [item(values, CONFIG) for values in sample["items"]]
            more = pack([[*items, *items[:0]]], GOLDEN.markers(CONFIG), TABLES)
            following = next_position(items)
            assert following >= (int(more.positions.max()) if more.length else 0)
            shifted = pack([items], GOLDEN.markers(CONFIG), TABLES, starts=[7])
            assert torch.equal(shifted.positions, more.positions + 7)


@pytest.mark.parametrize("number", range(len(GOLDEN.data["resize"]["transforms"])))
def test_image_sizes_are_the_references(number: int) -> None:
    resize = GOLDEN.data["resize"]
    transform = resize["transforms"][number]
    sizes = SideRange(longest=transform["max_size"], shortest=transform["min_size"], area=transform["max_pixels"])
    found = [
        sizes.fit(height, width, transform["stride"], images)[::-1]
        for (width, height), images in zip(resize["sizes_w_h"], resize["img_num"], strict=True)
    ]
    assert torch.equal(torch.tensor(found), GOLDEN[f"outputs.resize.{transform['name']}"])


def test_a_grid_beyond_its_table_is_refused() -> None:
    with pytest.raises(UserError, match="9x2 tokens is larger than the model's table of 8x8"):
        Tables(latent=8, vision=10).places(item({"type": "vae_image", "hw": [144, 32]}, CONFIG))  # type: ignore[arg-type]


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 5), st.integers(0, 2)), min_size=1, max_size=6))
def test_a_token_sees_itself_and_no_foreign_noise(splits: list[tuple[int, int]]) -> None:
    lengths, modes = [n for n, _ in splits], [mode for _, mode in splits]
    mask = sample_mask(lengths, modes)
    owner = [number for number, n in enumerate(lengths) for _ in range(n)]
    for query, own in enumerate(owner):
        for key, other in enumerate(owner):
            inside = modes[own] != 0 or query >= key
            expected = inside if own == other else other < own and modes[other] != 2
            assert bool(mask[query, key]) == expected


@settings(deadline=None)
@given(st.lists(st.integers(1, 40), max_size=30), st.integers(40, 90))
def test_rows_hold_every_sample_once_within_the_budget(costs: list[int], budget: int) -> None:
    rows = rows_within(costs, budget)
    assert sorted(place for row in rows for place in row) == list(range(len(costs)))
    assert all(sum(costs[place] for place in row) <= budget for row in rows)
    assert len(rows) <= 2 * sum(costs) // budget + 1


def test_a_sample_beyond_the_budget_is_named() -> None:
    with pytest.raises(UserError, match="sample 1 has 41 tokens, more than the budget of 40"):
        rows_within([3, 41], 40)
