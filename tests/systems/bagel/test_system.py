"""BAGEL under the contract: losses of packed rows, requests with their caches, thinking, parts, adapters, mistakes."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from bagel_system import TINY, build, picture, spec
from torch import Tensor

from diptych.core.draws import Draws
from diptych.core.errors import UserError
from diptych.core.sample import Batch, Message, Sample
from diptych.core.tokens import NextToken
from diptych.inference.engine import Engine
from diptych.inference.sampling import Sampling
from diptych.objectives.flow_matching import FlowMatching
from diptych.systems.bagel.config import BagelConfig
from diptych.systems.bagel.context import CacheCondition
from diptych.systems.bagel.system import BagelSystem

SAMPLING = Sampling(
    size=(16, 16), steps=2, cfg=3.0, guidance={"kind": "bagel", "renorm": "global"}, edit={"image_cfg": 1.5}
)


@pytest.fixture(scope="module")
def system() -> BagelSystem:
    return build().eval()


def batch() -> Batch:
    told = (Message(role="user", text="<image>\nhow many?"), Message(role="assistant", text="two"))
    return Batch(
        (
            Sample(id="a", task="text_to_image", text="a red circle", image=picture(0)),
            Sample(id="b", task="understand", messages=told, context_images=(picture(1),)),
            Sample(id="c", task="edit", text="make it blue", image=picture(2), context_images=(picture(3),)),
            Sample(id="d", task="understand", messages=(*told, *told), context_images=(picture(1), picture(4))),
            Sample(id="e", task="text_to_image", text="two crosses", image=picture(5, 24)),
        )
    )


def with_settings(system: BagelSystem, **values: Any) -> BagelSystem:
    system.settings = dataclasses.replace(system.settings, **values)
    return system


@pytest.mark.parametrize("prediction", ["velocity", "data"])
def test_packed_and_unpacked_losses_are_equal(prediction: Any) -> None:
    system = with_settings(build(), mean="sample", flow=FlowMatching(prediction=prediction))
    everything, draws = batch(), Draws([11, 12, 13, 14, 15])
    packed = system.losses(system.prepare(everything, draws), draws)
    with_settings(system, row_tokens=40, sample_tokens=40)
    rows = system.losses(system.prepare(everything, draws), draws)
    alone: dict[str, list[Tensor]] = {}
    for row in range(len(everything)):
        for name, values in system.losses(
            system.prepare(everything.take([row]), draws.take([row])), draws.take([row])
        ).items():
            alone.setdefault(name, []).append(values)
    assert packed.keys() == alone.keys() == {"flow.text_to_image", "flow.edit", "cross_entropy.understand"}
    for name, values in packed.items():
        torch.testing.assert_close(values, torch.cat(alone[name]), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(rows[name], values, rtol=1e-5, atol=1e-6)
    sum(values.sum() for values in packed.values()).backward()  # type: ignore[union-attr]
    for name, part in system.named_parts().items():
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in part.parameters()), name


def test_token_means_weigh_samples_by_their_tokens(system: BagelSystem) -> None:
    draws = Draws([1, 2, 3, 4, 5])
    for mean, flows, answers in (
        ("token", [4.0, 9.0], [2.0, 4.0]),  # 16 px and 24 px in patches of 8
        ("sample", [1.0, 1.0], [1.0, 1.0]),
        ("root", [4.0, 9.0], [2**0.5, 8**0.5]),
    ):
        prepared = with_settings(system, mean=mean).prepare(batch(), draws)
        assert prepared.weights["flow.text_to_image"] == flows
        assert prepared.counts["flow.text_to_image"] == [4.0, 9.0]
        assert prepared.weights["cross_entropy.understand"] == pytest.approx(answers)


def test_drops_leave_things_out_and_learn_the_rest(system: BagelSystem) -> None:
    nothing = dataclasses.replace(system.settings)
    assert nothing.cfg_dropout_text == 0.0
    reader, sample = system.reader, batch().samples[2]
    kept = reader.example(sample, system.settings, Draws([1]))
    dropped = dataclasses.replace(system.settings, cfg_dropout_text=1.0, cfg_dropout_vit=1.0, cfg_dropout_vae=1.0)
    bare = reader.example(sample, dropped, Draws([1]))
    assert bare.cost == 6 < kept.cost
    assert len(bare.items) == len(kept.items) == 4
    assert (len(bare.patches), len(bare.images)) == (0, 1)


def test_requests_in_a_batch_are_what_they_are_alone(system: BagelSystem) -> None:
    requests = [
        Sample(id="a", task="text_to_image", text="a red circle"),
        Sample(id="b", task="edit", text="make it blue", context_images=(picture(3),)),
    ]
    engine = Engine(system, dataclasses.replace(SAMPLING, edit={}))
    together = engine.tensors(requests, n=2, seed=4, image_cfg=1.5)
    for row, request in enumerate(requests):
        alone = engine.tensors([request], n=2, seed=4, image_cfg=1.5, positions=[row])
        for got, expected in zip(together[2 * row : 2 * row + 2], alone, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_questions_about_one_image_read_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight questions about two images, two of them twice: each image is read once, the answers are those of each
    question by itself, and rows that are finished leave the batch."""
    system = build().eval()
    texts = ["how many?", "which colour?", "what is left of it?", "how many?"]
    talks = [[Message(role="user", text=f"<image>{text}")] for text in texts] * 2
    images = [[picture(seed)] for seed in (6, 7) for _ in texts]
    ends = torch.tensor([1, 1, 1, 1, 1, 1, 3, 6])
    assert system.reader.markers.eos not in range(5, 13)

    def choose(first: int) -> NextToken:
        def chosen(logits: Tensor, step: int) -> Tensor:
            rows = ends[first : first + len(logits)]
            return torch.where(step >= rows, system.reader.markers.eos, 5 + logits[:, 5:13].argmax(-1))

        return chosen

    alone: list[str] = []
    for row, (talk, shown) in enumerate(zip(talks, images, strict=True)):
        system.store.entries.clear()
        alone += system.generate_text([talk], [shown], max_new_tokens=8, choose=choose(row))
    separately = system.store.read_tokens

    rows: list[int] = []
    run = system.network.llm.forward

    def counted(und: Tensor, *arguments: Any) -> Any:
        rows.append(len(und))
        return run(und, *arguments)

    system.store.entries.clear()
    monkeypatch.setattr(system.network.llm, "forward", counted)
    assert system.generate_text(talks, images, max_new_tokens=8, choose=choose(0)) == alone
    assert system.store.read_tokens - separately < 0.7 * separately, "0.75 where only repeated questions are read once"
    assert rows[-6:] == [8, 2, 2, 1, 1, 1]


@torch.no_grad()
def test_what_was_read_is_not_read_again() -> None:
    system = build().eval()
    edit = Batch((Sample(id="b", task="edit", text="make it blue", context_images=(picture(3),)),))
    first = system.encode(edit)
    assert system.store.reused_tokens == 0
    read = system.store.read_tokens
    free = system.encode(system.without(edit, "text"))
    assert system.store.read_tokens == read
    assert system.store.reused_tokens == free.length == first.length - len(system.reader.ids("make it blue", "")) - 2
    texts = system.encode(system.without(edit, "images"))
    assert texts.length == first.length - free.length
    assert int(texts.starts) == texts.length  # on its own rotary ids
    assert system.encode(system.without(edit, "text_and_images")).length == 0
    again = system.encode(edit)
    assert all(
        torch.equal(x, y) for a, b in zip(again.layers, first.layers, strict=True) for x, y in zip(a, b, strict=True)
    )

    question = [Message(role="user", text="<image>how many?")]
    answer = system.generate_text([question], [[picture(6)]], max_new_tokens=3)[0]
    before, told = system.store.read_tokens, system.store.reused_tokens
    turns = [*question, Message(role="assistant", text=answer or "two"), Message(role="user", text="which colour?")]
    system.generate_text([turns], [[picture(6)]], max_new_tokens=3)
    assert system.store.reused_tokens > told
    assert system.store.read_tokens - before < system.store.reused_tokens - told + 20

    system.network.llm.norm.weight.mul_(1.5)  # a changed weight makes everything stale
    reused = system.store.reused_tokens
    system.encode(edit)
    assert system.store.reused_tokens == reused


def test_conditions_are_joined_taken_and_masked(system: BagelSystem) -> None:
    with torch.no_grad():
        short = system.encode(Batch((Sample(id="a", task="text_to_image", text="a"),)))
        long = system.encode(Batch((Sample(id="b", task="text_to_image", text="two crosses and a circle"),)))
        joined = short.join([long])
        x, t = torch.randn(1, 3, 16, 16), torch.tensor([0.7])
        both = system.velocity(x.repeat(2, 1, 1, 1), t.repeat(2), joined)
        swapped = system.velocity(x.repeat(2, 1, 1, 1), t.repeat(2), joined.take([1, 0]))
        assert isinstance(joined, CacheCondition)
        assert joined.mask is not None
        torch.testing.assert_close(both[:1], system.velocity(x, t, short), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(both[1:], system.velocity(x, t, long), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(swapped, both.flip(0), rtol=1e-5, atol=1e-6)


def test_a_caption_may_be_imagined_whole(system: BagelSystem, monkeypatch: pytest.MonkeyPatch) -> None:
    wording = dataclasses.replace(system.settings.wording, think_image="{text}?")
    monkeypatch.setattr(system, "settings", dataclasses.replace(system.settings, wording=wording))
    asked = Batch((Sample(id="a", task="text_to_image", text="a red circle"),))
    imagined, (said,) = system.expand(asked, 3)
    assert said == system.generate_text([[Message(role="user", text="a red circle?")]], [[]], max_new_tokens=3)[0]
    assert imagined.samples == (dataclasses.replace(asked.samples[0], text=said or "a red circle"),)


def test_thinking_puts_a_thought_behind_the_request(system: BagelSystem) -> None:
    asked = Batch((Sample(id="a", task="text_to_image", text="a red circle"),))
    thought, said = system.expand(asked, 3)
    roles = [message.role for message in thought.samples[0].messages]
    assert roles == ["system", "assistant"]
    assert said == [thought.samples[0].messages[-1].text]
    free = system.without(thought, "text").samples[0]
    assert [message.role for message in free.messages] == ["system"]
    assert system.without(thought, "text_and_images").samples[0].messages == ()
    engine = Engine(system, SAMPLING)
    assert len(engine.generate("a red circle", prompt_expansion=2)) == 1
    assert isinstance(engine.ask(None, "how many?", max_new_tokens=2, think=True), str)


def test_every_parameter_is_in_exactly_one_part(system: BagelSystem) -> None:
    owned = [id(p) for part in system.named_parts().values() for p in {id(p): p for p in part.parameters()}.values()]
    assert len(owned) == len(set(owned))
    assert set(owned) == {id(p) for p in system.parameters()}


def test_adapters() -> None:
    lora = {"rank": 2, "alpha": 2, "dropout": 0.0, "targets": ["gen.q_proj"]}
    system = build(lora=lora)
    parts = system.named_parts()
    assert sum(p.numel() for p in parts["lora"].parameters()) == 2 * 2 * (32 + 32)
    own = {id(p) for part in parts.values() for p in part.parameters()}
    assert own == {id(p) for p in system.parameters()}
    with pytest.raises(UserError, match=r"unknown LoRA target 'gen.q_proje'. Did you mean"):
        build(lora={**lora, "targets": ["gen.q_proje"]})


MISTAKES: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"text": "word " * 200}, {}, r"x: \d+ tokens, more than sample_tokens 64; nothing is cut"),
    ({"task": "edit", "text": "a", "context_images": tuple(picture(i) for i in range(9))}, {}, r"9 images among them"),
    ({"text": "a <|im_end|> b"}, {}, r"x: the text holds the reserved token <\|im_end\|>"),
    ({"text": "a", "image": None}, {}, "x: task 'text_to_image' needs a target image"),
    (
        {"task": "edit", "text": "a <image> <image>", "context_images": (picture(1),)},
        {},
        "2 <image> placeholders but 1",
    ),
    ({"text": "a", "image": torch.zeros(3, 8, 80)}, {}, "1x10 tokens is larger than the model's table of 4x4"),
]


@pytest.mark.parametrize(("values", "settings", "message"), MISTAKES)
def test_mistakes_are_named(
    system: BagelSystem, values: dict[str, Any], settings: dict[str, Any], message: str
) -> None:
    given: dict[str, Any] = {"id": "x", "task": "text_to_image", "image": picture(0), **values}
    system.settings = dataclasses.replace(system.settings, row_tokens=64, sample_tokens=64, **settings)
    with pytest.raises(UserError, match=message):
        system.losses(system.prepare(Batch((Sample(**given),)), Draws([1])), Draws([1]))
    system.settings = TINY


def test_settings_that_cannot_be_are_refused() -> None:
    with pytest.raises(UserError, match="sample_tokens 9 must be above 0 and at most row_tokens 8"):
        BagelConfig(row_tokens=8, sample_tokens=9)
    with pytest.raises(UserError, match="cfg_dropout_text must be between 0 and 1"):
        BagelConfig(cfg_dropout_text=1.5)
    with pytest.raises(UserError, match="guidance 'chain': unknown option 'renorm'"):
        Sampling(guidance={"kind": "chain", "renorm": "global"})
    with pytest.raises(UserError, match=r"edit: unknown option 'image_cgf'. Did you mean 'image_cfg'"):
        Sampling(edit={"image_cgf": 2.0})
    assert spec().kind == "bagel"
