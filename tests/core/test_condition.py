"""Joining and taking conditions, and what batches refuse."""

from __future__ import annotations

import pytest
import torch

from diptych.core.condition import TokenCondition
from diptych.core.errors import UserError, nearest, unknown
from diptych.core.sample import Batch, Sample


def condition(batch: int, length: int, masked: bool = False, **extra: object) -> TokenCondition:
    mask = torch.rand(batch, length) > 0.5 if masked else None
    return TokenCondition(tokens=torch.randn(batch, length, 3), mask=mask, **extra)  # type: ignore[arg-type]


def test_join_pads_and_masks() -> None:
    short, long = condition(2, 3), condition(1, 5, masked=True)
    joined = short.join([long])
    assert joined.batch_size == 3
    assert torch.equal(joined.tokens[:2, :3], short.tokens)
    assert torch.equal(joined.tokens[2:], long.tokens)
    assert not joined.tokens[:2, 3:].any()
    assert joined.mask is not None
    assert joined.mask[0].tolist() == [True, True, True, False, False]
    assert torch.equal(joined.mask[2:], long.full_mask())
    assert short.join([condition(4, 3)]).mask is None


def test_take_repeats_rows_of_everything() -> None:
    latents = tuple((torch.randn(2, 4, 4),) * count for count in (1, 2, 0))
    whole = condition(3, 4, masked=True, pooled=torch.randn(3, 2), context_latents=latents)
    taken = whole.take([2, 0, 2])
    for name in ("tokens", "mask", "pooled"):
        assert torch.equal(getattr(taken, name), getattr(whole, name)[[2, 0, 2]])
    assert taken.context_latents is not None
    assert [len(row) for row in taken.context_latents] == [0, 1, 0]
    rejoined = whole.take([0]).join([whole.take([1]), whole.take([2])])
    assert torch.equal(rejoined.tokens, whole.tokens)
    assert rejoined.context_latents is not None
    assert [len(row) for row in rejoined.context_latents] == [1, 2, 0]


def test_unlike_conditions_do_not_join() -> None:
    with pytest.raises(AssertionError, match="unlike"):
        condition(1, 2, pooled=torch.randn(1, 2)).join([condition(1, 2)])


def test_batches_name_what_does_not_fit() -> None:
    image = torch.zeros(3, 8, 8)
    with pytest.raises(UserError, match="at least one sample"):
        Batch(())
    with pytest.raises(UserError, match="b: task 'text_to_image' needs a target image"):
        Batch((Sample(id="a", task="image", image=image), Sample(id="b", task="text_to_image"))).images()
    wide = Sample(id="w", task="image", image=torch.zeros(3, 8, 16))
    with pytest.raises(UserError, match=r"w: image of size \(8, 16\) in a batch of size \(8, 8\)"):
        Batch((Sample(id="a", task="image", image=image), wide)).images()
    mixed = Batch((wide, Sample(id="u", task="understand"), Sample(id="v", task="image", image=image)))
    assert mixed.rows("image") == [0, 2]
    assert mixed.take([2, 0]).ids == ("v", "w")


def test_errors_name_the_nearest() -> None:
    assert nearest("decodr", ["decoder", "adapter"]) == "decoder"
    assert nearest("zzz", ["decoder"]) is None
    error = unknown("part", "decodr", ["decoder", "adapter"], "stages.mix")
    assert str(error) == "stages.mix: unknown part 'decodr'. Did you mean 'decoder'? Choices: adapter, decoder."
