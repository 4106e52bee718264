"""Weights that are made later are those that the same code makes at once, and cost no more memory than they must."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from diptych.checkpoints.deferred import active, deferred, to_be_loaded
from diptych.checkpoints.streaming import stream
from diptych.checkpoints.tensors import load_into, read_tensors, write_tensors
from diptych.core.errors import UserError
from diptych.training.memory import AllocationTracker


class Net(nn.Module):
    """One of each way in which modules of this project and of its libraries get their first values."""

    table: Tensor
    places: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.words = nn.Embedding(10, 8, padding_idx=3)
        self.head = nn.Linear(8, 10, bias=False)
        self.head.weight = self.words.weight
        self.token = nn.Parameter(torch.randn(5) * 0.02)
        self.norm = nn.LayerNorm(8)
        self.register_buffer("table", torch.outer(torch.arange(4.0), torch.ones(3)), persistent=False)
        self.register_buffer("places", torch.tensor([3, 1, 2]))
        self.last = nn.Linear(8, 4)
        nn.init.trunc_normal_(self.last.weight, std=0.5)
        nn.init.normal_(self.first.weight, std=0.02)  # again, as transformers does after all is built
        with torch.no_grad():
            self.last.bias.copy_(self.words.weight[2, :4])
            self.first.bias.zero_().add_(1.5)
            self.last.weight[0].mul_(0)


def same(a: nn.Module, b: nn.Module) -> None:
    one = {**dict(a.named_buffers()), **dict(a.named_parameters())}
    two = {**dict(b.named_buffers()), **dict(b.named_parameters())}
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert tensor.dtype == two[name].dtype, name
        assert torch.equal(tensor, two[name]), name


def later(build: Callable[[], Any], seed: int = 0) -> Any:
    with deferred() as weights:
        made = build()
    assert all(parameter.is_meta for parameter in made.parameters())
    torch.manual_seed(seed)
    weights.plan(made).fill()
    return made


def test_random_weights_are_the_same() -> None:
    """Mutants: a draw that is overwritten left out; an operation on a part of a tensor taken for one on all of it."""
    torch.manual_seed(0)
    at_once, after = Net(), torch.rand(3)
    made = later(Net)
    assert torch.equal(torch.rand(3), after), "as many random numbers were taken"
    same(at_once, made)
    assert made.head.weight is made.words.weight
    assert active() is None


def test_one_that_will_be_read_draws_nothing() -> None:
    def build() -> nn.Module:
        with to_be_loaded():
            unread = nn.Linear(3, 3)
        with torch.no_grad():
            unread.weight.zero_()
            unread.bias.zero_()
        return nn.Sequential(unread, nn.Linear(3, 3))

    torch.manual_seed(0)
    expected = nn.Linear(3, 3)
    same(later(build)[1], expected)


def renamed(file: Path) -> dict[str, Tensor]:
    """A release that keeps two layers in one, the other way round, and in another number format."""
    tensors = dict(stream([file]))
    first, second = tensors["both"].T.chunk(2)
    return {"0.weight": first, "1.weight": second, "0.bias": tensors["bias"], "1.bias": torch.zeros(4)}


def test_read_weights_are_the_same(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"both": torch.randn(4, 8), "bias": torch.randn(4, dtype=torch.bfloat16)}, file)

    def build() -> nn.Module:
        net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        load_into(net, renamed(file).items(), str(file))
        return net

    same(build(), later(build))


def test_the_file_tells_the_format(tmp_path: Path) -> None:
    net = nn.Linear(4, 4)
    write_tensors(tmp_path, net.state_dict().items(), dtype=torch.bfloat16)
    with deferred() as weights:
        twice: Any = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])  # one is copied from the other
        load_into(twice[0], read_tensors([tmp_path / "model.safetensors"]), "here")
        load_into(twice[1], iter(twice[0].state_dict().items()), "there")
    plan = weights.plan(twice)
    assert plan.formats == dict.fromkeys(dict(twice.named_parameters()), torch.bfloat16)
    plan.fill(dtype=lambda name: torch.bfloat16 if name.startswith("0") else None)
    assert (twice[0].weight.dtype, twice[1].weight.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(twice[0].weight.float(), net.weight.detach().bfloat16().float())
    assert torch.equal(twice[1].weight, twice[0].weight.float())


def test_a_damaged_tensor_is_named(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    write_tensors(tmp_path, nn.Linear(4, 4).state_dict().items())
    data = bytearray(file.read_bytes())
    data[-1] ^= 255
    file.write_bytes(data)
    with deferred() as weights:
        net = nn.Linear(4, 4)
        load_into(net, read_tensors([file]), "here")
    with pytest.raises(UserError, match=r"model.safetensors: \w+ is damaged"):
        weights.plan(net).fill()


@pytest.mark.parametrize("source", ["random", "file"])
def test_memory(source: str, tmp_path: Path) -> None:
    """The weights in their format and one tensor more, where they are drawn or read in float32."""

    def build() -> nn.Module:
        return nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(16)))

    write_tensors(tmp_path, build().state_dict().items())
    with deferred() as weights:
        net = build()
        if source == "file":
            load_into(net, read_tensors([tmp_path / "model.safetensors"]), "here")
        net.bfloat16()
    plan = weights.plan(net)
    with AllocationTracker() as tracker:
        plan.fill()
    size = sum(parameter.nbytes for parameter in net.parameters())
    largest = 64 * 64 * 4
    assert size <= tracker.now <= 1.05 * size
    assert tracker.peak <= size + 2.1 * largest
