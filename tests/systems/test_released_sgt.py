"""OmniGen2's side of the released SGT code: prompts, states, times, loss weights; prompts that are cut."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from diptych.core.draws import Draws
from diptych.core.sample import IMAGE_PLACEHOLDER, Sample
from diptych.objectives import flow_matching
from diptych.objectives.masked_image import drop
from diptych.parts.backbones.chat import CHATML
from diptych.recipes import recipe as recipes
from diptych.recipes.build import build_system
from diptych.recipes.recipe import parse
from diptych.systems.composed import ComposedSystem
from diptych.systems.presets import OmniGen2Settings
from sgt_golden import facts

FACTS = facts("omnigen2")
NEWLINE = 20
MARKS = {"<|im_start|>": 1, "<|im_end|>": 2, "<|vision_start|>": 3, "<|image_pad|>": 4, "<|vision_end|>": 5}


def released_settings() -> OmniGen2Settings:
    settings = recipes.load("sgt/omnigen2/released")[0].stages["tune"].settings
    return OmniGen2Settings(**settings)


def test_the_request_is_the_releases() -> None:
    """`<img1>: `, the picture, the instruction; the assistant's turn opened and empty."""
    prompts = released_settings().common().prompts
    proxy = FACTS["proxy"]
    picture = torch.zeros(3, 8, 8)
    sample = Sample(id="p", task="edit", text="color the parts", context_images=(picture,))
    slots = "<|vision_start|><|image_pad|><|vision_end|>"
    [system, user] = prompts.conversation(sample, 1)
    assert user.text.replace(IMAGE_PLACEHOLDER, slots) == proxy["user_turn"]
    assert (prompts.opens, prompts.opening) == (proxy["answer_turn_opened"], "")
    # The ids, marks and newlines of the fixture's toy tokenizer; its words are ids from 10 on.
    ids: list[int] = proxy["prompt_ids"]
    start, end = MARKS["<|im_start|>"], MARKS["<|im_end|>"]
    assert ids.count(start) == 3
    assert ids.count(end) == 2, "the last turn is open"
    assert ids[-1] == NEWLINE
    words = len(system.text.split())
    assert ids[2:4] != []
    assert len(ids) == 3 + words + 2 + 3 + 1 + (1 + 6 + 1) + 3 + 2 + 3
    assert CHATML.count("<|im_start|>") == 2
    assert released_settings().common().reference_latents is False is proxy["reads_latents_of_the_picture"]
    assert released_settings().cfg_dropout == 0, "the prompt of a SAM picture is never dropped"


def test_the_last_states_are_kept() -> None:
    rule = FACTS["states_kept"]
    settings = released_settings()
    assert settings.max_states == rule["kept"] == rule["axes_lens_0"] - 128
    lengths = torch.tensor([1300, 500, 896])
    mask = torch.arange(1300) < lengths[:, None]
    states = torch.arange(1300.0)[None, :, None].expand(3, 1300, 1)
    from_end = mask.flip(1).cumsum(1).flip(1)
    kept, kept_mask = drop(states, mask, from_end <= rule["kept"])
    for row, length in enumerate(lengths.tolist()):
        expected = torch.arange(max(0, length - rule["kept"]), length, dtype=torch.float32)
        assert torch.equal(kept[row, kept_mask[row], 0], expected)


@pytest.mark.parametrize("row", FACTS["times"]["rows"], ids=lambda row: str(row["normal"][0]))
def test_times_are_the_releases(row: dict[str, Any]) -> None:
    """Theirs count 1 as clean: ours are 1 minus theirs, from the negated normal."""
    flow = OmniGen2Settings().flow
    raw = flow_matching.logit_normal_times(-torch.tensor(row["normal"], dtype=torch.float64))
    tokens = [tall * wide // 4 for tall, wide in row["latent_sides"]]
    ours = flow.shift(raw, tokens)
    torch.testing.assert_close(1 - ours, torch.tensor(row["t_data_at_1"], dtype=torch.float64), rtol=0, atol=1e-6)


def test_loss_weights_are_the_releases() -> None:
    stage = recipes.load("sgt/omnigen2/released")[0].stages["tune"]
    summary = facts("weights")["omnigen2"]["released_summary"]
    assert stage.balance == "terms", "means of the two kinds are added"
    flow, text = stage.loss_weights["flow"], stage.loss_weights["cross_entropy"]
    assert flow == pytest.approx(summary["drawing_micro_batches"] * summary["weight_each"])
    assert flow / text == pytest.approx(summary["ratio_of_the_two_losses"], rel=1e-5)


@pytest.mark.parametrize("case", FACTS["interleave"], ids=lambda case: f"{case['pattern']} {case['world']}")
def test_batches_of_the_release_hold_their_kinds_in_a_fixed_ratio(case: dict[str, Any]) -> None:
    """Theirs: batches of one kind in a pattern, until a pool runs out. A `balanced` mixture holds the same ratio in
    every step; gen, gen, sft is 2 proxies a conversation."""
    for indices in case["indices_by_rank"]:
        assert len(set(indices)) == len(indices)
        batches = [indices[at : at + case["batch_size"]] for at in range(0, len(indices), case["batch_size"])]
        kinds = ["proxy" if batch[0] >= 1000 else "conversation" for batch in batches]
        assert all(len({index >= 1000 for index in batch}) == 1 for batch in batches)
        if case["pattern"] == ["gen", "gen", "sft"]:
            assert kinds == ["proxy", "proxy", "conversation"] * (len(kinds) // 3)
    stage = recipes.load("sgt/omnigen2/full")[0].stages["tune"]
    assert stage.data.balanced
    weights = {name: source.weight for name, source in stage.data.sources.items()}
    assert weights.pop("proxies") == 2 * sum(weights.values())


def test_long_prompts_are_cut_and_it_is_said(tiny_plain: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    tiny_plain["system"]["prompt_tokens"] = 4
    system = build_system(parse(tiny_plain).system)
    assert isinstance(system, ComposedSystem)
    preparer, tokenizer = system.preparer(), system.backbone.processor.tokenizer
    long = "a red circle left of a blue square and two green crosses"
    with caplog.at_level(logging.WARNING):
        found = preparer.request(Sample(id="long", task="text_to_image", text=long))
    [said] = [record.getMessage() for record in caplog.records if record.getMessage().startswith("long: ")]
    assert said.endswith("is cut to prompt_tokens 4")
    first = str(tokenizer.decode(tokenizer(long, add_special_tokens=False)["input_ids"][:4]))  # type: ignore[index]
    short = preparer.request(Sample(id="short", task="text_to_image", text=first))
    assert torch.equal(found.inputs.sequences.ids, short.inputs.sequences.ids)
    caplog.clear()
    preparer.request(Sample(id="short", task="text_to_image", text="a circle"), Draws([1]))
    assert not caplog.records
