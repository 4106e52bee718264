from __future__ import annotations

import torch

from diptych.core.sample import Batch, Sample


def sample(name: str, side: int, contexts: int) -> Sample:
    images = tuple(torch.full((3, side, side), float(n)) for n in range(contexts))
    return Sample(id=name, task="edit", image=torch.full((3, side, side), 9.0), context_images=images)


def test_a_moved_batch_keeps_every_tensor_in_its_place() -> None:
    batch = Batch((sample("a", 4, 1), sample("b", 2, 2), Sample(id="c", task="understand"), sample("d", 4, 0)))
    moved = batch.to("meta")
    assert moved.ids == batch.ids
    for old, new in zip(batch, moved, strict=True):
        assert [tensor.shape for tensor in new.tensors()] == [tensor.shape for tensor in old.tensors()]
        assert {tensor.device.type for tensor in new.tensors()} <= {"meta"}
    assert batch.to("cpu") is batch


def test_each_tensor_of_a_sample_is_changed() -> None:
    latent = Sample(id="l", task="image", image=torch.ones(3, 2, 2), latent=torch.full((4, 1, 1), 5.0))
    batch = Batch((sample("a", 2, 2), latent))
    other = Batch(tuple(one.mapped(lambda tensor: tensor.double()) for one in batch))
    assert [tensor.dtype for one in other for tensor in one.tensors()] == [torch.float64] * 5
    assert [tensor.mean().item() for one in other for tensor in one.tensors()] == [9.0, 0.0, 1.0, 1.0, 5.0]
