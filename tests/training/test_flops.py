"""FLOPs counted against products of their sizes, written out by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from diptych.training.flops import FlopCounter

BATCH, TOKENS, WIDTH, OUT = 2, 8, 16, 24
PRODUCT = 2 * BATCH * TOKENS * WIDTH * OUT


@pytest.mark.parametrize(
    ("weight", "x", "factor"), [(True, True, 3), (True, False, 2), (False, True, 2), (False, False, 1)]
)
def test_a_linear_layer_counts_once_forward_and_once_for_each_gradient(weight: bool, x: bool, factor: int) -> None:
    layer = nn.Linear(WIDTH, OUT).requires_grad_(weight)
    inputs = torch.zeros(BATCH, TOKENS, WIDTH, requires_grad=x)
    with FlopCounter() as counter:
        layer(inputs)
    assert counter.total == factor * PRODUCT
    with FlopCounter() as counter, torch.no_grad():
        layer(inputs)
    assert counter.total == PRODUCT


@pytest.mark.parametrize("learns", [False, True])
def test_attention_counts_two_products_and_four_backward(learns: bool) -> None:
    heads, queries, keys, width = 4, 8, 16, 32
    query = torch.zeros(BATCH, heads, queries, width, requires_grad=learns)
    key = torch.zeros(BATCH, heads, keys, width, requires_grad=learns)
    with FlopCounter() as counter:
        F.scaled_dot_product_attention(query, key, key.clone())
    one = 2 * BATCH * heads * queries * keys * width
    assert counter.total == (6 if learns else 2) * one


def test_convolutions() -> None:
    image = torch.zeros(1, 3, 8, 8)
    with FlopCounter() as counter, torch.no_grad():
        nn.Conv2d(3, 5, 3, padding=1)(image)
    assert counter.total == 2 * 5 * 8 * 8 * (3 * 9)
    with FlopCounter() as counter, torch.no_grad():
        nn.ConvTranspose2d(3, 5, 2, stride=2)(image)
    assert counter.total == 2 * 3 * 8 * 8 * (5 * 4)
