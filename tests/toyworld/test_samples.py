from __future__ import annotations

from itertools import permutations
from typing import get_args

import pytest
import torch

from diptych.core.errors import UserError
from diptych.core.sample import IMAGE_PLACEHOLDER, TASKS, Task
from diptych.toyworld.edits import EDIT_KINDS, Edit
from diptych.toyworld.language import DESCRIBE, LIST, QUESTION_KINDS, ask_place, describe, slots, vocabulary, words
from diptych.toyworld.render import render
from diptych.toyworld.samples import ToyWorld
from diptych.toyworld.scene import CELLS, Scene
from diptych.toyworld.shapes import SHAPES
from diptych.toyworld.statements import KINDS, held_out


@pytest.mark.parametrize("task", TASKS)
def test_samples_depend_on_seed_and_index_alone(task: Task) -> None:
    first, again, other = ToyWorld(3), ToyWorld(3), ToyWorld(4)
    for _ in range(5):
        first.sample(task, 0)
    one, two = first.sample(task, 17), again.sample(task, 17)
    assert one.id == f"toyworld:{task}:3:17"
    assert (one.text, one.messages, one.extra) == (two.text, two.messages, two.extra)
    if one.image is not None and two.image is not None:
        assert torch.equal(one.image, two.image)
    assert other.sample(task, 17).extra != one.extra
    assert ToyWorld(3, 64).sample(task, 17).extra == one.extra


def test_image_samples_have_one_to_four_objects() -> None:
    world = ToyWorld(0)
    counts = {len(world.sample("image", index).extra["scene"]["objects"]) for index in range(60)}
    assert counts == {1, 2, 3, 4}
    sample = ToyWorld(0, 64).sample("image", 0)
    assert sample.image is not None
    assert sample.image.shape == (3, 64, 64)
    assert sample.text == ""


def test_captions_are_never_held_out_and_match_their_image() -> None:
    world = ToyWorld(0)
    seen: set[str] = set()
    for index in range(400):
        sample = world.sample("text_to_image", index)
        seen.add(sample.extra["kind"])
        scene = Scene.from_dict(sample.extra["scene"])
        assert sample.image is not None
        assert torch.equal(sample.image, render(scene))
        if sample.extra["key"] is None:
            orders = permutations(range(len(scene.objects)))
            assert any(sample.text.endswith(describe(scene, order)) for order in orders)
        else:
            assert not held_out(sample.extra["key"])
    assert seen == {*KINDS, "full"}


def test_edit_samples() -> None:
    world = ToyWorld(1)
    kinds: set[str] = set()
    for index in range(80):
        sample = world.sample("edit", index)
        edit = Edit.from_dict(sample.extra["edit"])
        kinds.add(edit.kind)
        assert sample.text == edit.instruction
        assert sample.image is not None
        assert torch.equal(sample.image, render(edit.target))
        assert torch.equal(sample.context_images[0], render(edit.source))
        assert not torch.equal(sample.image, sample.context_images[0])
    assert kinds == set(EDIT_KINDS)


def test_kinds_of_edits_can_be_chosen() -> None:
    world = ToyWorld(1, edits=["recolour", "recolour", "replace"], edited=1.0, text_only=0.0)
    for task in ("edit", "understand"):
        drawn = [world.sample(task, index).extra["edit"]["kind"] for index in range(300)]
        assert set(drawn) == {"recolour", "replace"}
        assert 160 < drawn.count("recolour") < 240
    every = ToyWorld(1, edits=list(EDIT_KINDS))
    assert [every.sample("edit", i).text for i in range(30)] == [ToyWorld(1).sample("edit", i).text for i in range(30)]
    with pytest.raises(UserError, match=r"unknown kind of edit 'recolor'.*recolour"):
        ToyWorld(edits=["recolor"])  # type: ignore[list-item]
    with pytest.raises(UserError, match="at least one kind of edit"):
        ToyWorld(edits=[])


def test_conversations() -> None:
    world = ToyWorld(2)
    kinds: set[str] = set()
    told = walked = 0
    for index in range(600):
        sample = world.sample("understand", index)
        asked, answered = sample.messages[::2], sample.messages[1::2]
        assert 1 <= len(asked) == len(answered) <= world.turns
        if sample.extra["question_kinds"] == ["place"] * 4:
            walked += 1
            scene = Scene.from_dict(sample.extra["scene"])
            cells = [next(i for i, cell in enumerate(CELLS) if turn.text.endswith(f"the {cell}?")) for turn in asked]
            assert sorted(cells) == [0, 1, 2, 3]
            assert [turn.text for turn in answered] == [ask_place(scene, cell).answer for cell in cells]
        assert {turn.role for turn in asked} == {"user"}
        assert {turn.role for turn in answered} == {"assistant"}
        assert len(sample.extra["question_kinds"]) == len(asked)
        kinds |= set(sample.extra["question_kinds"])
        opening = asked[0].text
        assert all(IMAGE_PLACEHOLDER not in turn.text for turn in sample.messages[1:])
        if sample.extra["text_only"]:
            told += 1
            assert opening.startswith("scene: ")
            assert not sample.context_images
            assert not (sample.extra["key"] and held_out(sample.extra["key"]))
        else:
            assert opening.startswith(f"{IMAGE_PLACEHOLDER}\n")
            assert len(sample.context_images) == 1
        if asked[-1].text.endswith(DESCRIBE):
            assert answered[-1].text == describe(Scene.from_dict(sample.extra["scene"]))
    assert kinds == set(QUESTION_KINDS)
    assert 0.2 < told / 600 < 0.4
    assert 0.03 < walked / 600 < 0.1


def test_lessons_about_short_captions() -> None:
    world = ToyWorld(2, text_only=1.0, short_captions=1.0, asked=["color", "relation"], turns=1)
    for index in range(200):
        sample = world.sample("understand", index)
        assert len(sample.messages) == 2
        assert sample.extra["question_kinds"] in (["color"], ["relation"])
        statement = sample.extra["key"].split("|")
        assert statement[0] in {"colors", "position", "color_attribution"}
        if "what color is the " in sample.messages[0].text:
            asked = sample.messages[0].text.split("what color is the ")[1][:-1]
            assert f"{sample.messages[1].text} {asked}" in statement


def test_lessons_about_edits() -> None:
    world = ToyWorld(3, edited=1.0, short_captions=0.0, text_only=0.5)
    told: set[bool] = set()
    for index in range(100):
        sample = world.sample("understand", index)
        edit = Edit.from_dict(sample.extra["edit"])
        asked, answered = sample.messages[::2], sample.messages[1::2]
        told.add(sample.extra["text_only"])
        assert f"{edit.instruction}. " in asked[0].text
        assert Scene.from_dict(sample.extra["scene"]) == edit.source
        if sample.extra["text_only"]:
            assert not sample.context_images
        else:
            assert torch.equal(sample.context_images[0], render(edit.source))
        if asked[-1].text.endswith(DESCRIBE):
            assert [turn.text for turn in answered] == [describe(edit.target)]
        else:
            cells = [next(i for i, cell in enumerate(CELLS) if turn.text.endswith(f"the {cell}?")) for turn in asked]
            assert [turn.text for turn in answered] == [ask_place(edit.target, cell).answer for cell in cells]
    assert told == {True, False}


def test_lessons_that_imagine_what_a_caption_leaves_open() -> None:
    world = ToyWorld(4, imagined=1.0, short_captions=1.0, text_only=1.0)
    for index in range(60):
        sample = world.sample("understand", index)
        assert [turn.role for turn in sample.messages] == ["user", "assistant"]
        assert sample.messages[0].text.endswith(f". {DESCRIBE}")
        scene, answer = Scene.from_dict(sample.extra["scene"]), sample.messages[1].text
        assert answer in {describe(scene, order) for order in permutations(range(len(scene.objects)))}
        assert not held_out(sample.extra["key"])
        shapes = [word for word in words(sample.messages[0].text.partition(DESCRIBE)[0]) if word in SHAPES]
        if len(shapes) == 2:  # in the caption's order
            assert [word for word in words(answer) if word in SHAPES] == shapes


def test_lessons_that_ask_for_all_there_is() -> None:
    for placed in (0.0, 1.0):
        world = ToyWorld(4, captions=1.0, placed=placed, text_only=0.0)
        kinds = {kind for index in range(30) for kind in world.sample("understand", index).extra["question_kinds"]}
        assert kinds == ({"place"} if placed else {"caption"})


def test_full_captions_are_told_in_any_order() -> None:
    world = ToyWorld(4, full=1.0)
    told = [world.sample("text_to_image", index) for index in range(40)]
    orders = [describe(Scene.from_dict(sample.extra["scene"])) in sample.text for sample in told]
    assert 5 < sum(orders) < 35


def test_lists_tell_every_slot_in_any_order() -> None:
    world = ToyWorld(6, listed=1.0, captions=1.0, edited=0.5, imagined=0.5, text_only=0.5)
    orders: set[tuple[str, ...]] = set()
    for index in range(100):
        sample = world.sample("understand", index)
        if sample.extra["question_kinds"] != ["caption"]:
            assert sample.extra["key"]  # a short caption that is asked for a part
            continue
        assert sample.messages[0].text.endswith(LIST)
        scene = Scene.from_dict(sample.extra["scene"])
        if "edit" in sample.extra:
            scene = Edit.from_dict(sample.extra["edit"]).target
        told = [part.rsplit(" ", 1) for part in sample.messages[1].text.split(", ")]
        orders.add(tuple(slot for slot, _ in told))
        assert sorted(slot for slot, _ in told) == sorted(slots())
        found = dict(told)
        assert found["background"] == scene.background
        for cell, name in enumerate(CELLS):
            thing = scene.at(cell)
            wanted = (thing.colour, thing.shape) if thing else ("nothing", "nothing")
            assert (found[f"{name} color"], found[f"{name} shape"]) == wanted
    assert len(orders) > 50


def test_the_language_is_closed() -> None:
    known = set(vocabulary())
    assert len(known) < 100
    used: set[str] = set()
    world = ToyWorld(5)
    for index in range(1000):
        for task in ("text_to_image", "edit"):
            used |= set(words(world.sample(task, index).text))
        for message in world.sample("understand", index).messages:
            used |= set(words(message.text.replace(IMAGE_PLACEHOLDER, "")))
    assert used == known


def test_mistakes_are_named() -> None:
    with pytest.raises(UserError, match="text_only is a share between 0 and 1, not 3"):
        ToyWorld(0, text_only=3)
    with pytest.raises(UserError, match=r"about a short caption 'colour'\. Did you mean 'color'"):
        ToyWorld(0, asked=["colour"])  # pyright: ignore[reportArgumentType]
    for empty in ({"turns": 0}, {"asked": []}):
        with pytest.raises(UserError, match="at least one turn"):
            ToyWorld(0, **empty)
    with pytest.raises(UserError, match="at least 8 pixels"):
        ToyWorld(0, 4)
    with pytest.raises(UserError, match="Did you mean 'edit'"):
        ToyWorld(0).sample("edits", 0)  # pyright: ignore[reportArgumentType]
    assert set(get_args(Task)) == set(TASKS)
