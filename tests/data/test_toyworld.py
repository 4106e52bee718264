from __future__ import annotations

import pytest
import torch

from diptych.core.errors import UserError
from diptych.data.source import ItemDraws
from diptych.data.toyworld import ToyWorldSource


@pytest.mark.parametrize("task", ["image", "text_to_image", "edit", "understand"])
def test_items_follow_their_index(task: str) -> None:
    source = ToyWorldSource(task=task, count=10, seed=4, start=3)
    shifted = ToyWorldSource(task=task, count=10, seed=4)
    one, same = source.load(2, ItemDraws(1), (32, 32)), shifted.load(5, ItemDraws(9), (32, 32))
    assert one.id == same.id
    assert one.task == task
    assert one.messages == same.messages
    assert source.fingerprint(2) == shifted.fingerprint(5)
    assert source.fingerprint(2) != source.fingerprint(3)
    if task != "understand":
        assert one.image is not None
        assert same.image is not None
        assert torch.equal(one.image, same.image)
        with pytest.raises(UserError, match="draws 32x32, but the batch is 64x32"):
            source.load(0, ItemDraws(0), (64, 32))
    assert source.sizes() is None
    assert len(source) == 10


def test_wrong_settings() -> None:
    with pytest.raises(UserError, match="count 0"):
        ToyWorldSource(task="image", count=0)
    with pytest.raises(UserError, match="'edit'"):
        ToyWorldSource(task="edits", count=1)
