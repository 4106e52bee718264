from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch

from diptych.core.errors import UserError
from diptych.toyworld.render import render
from diptych.toyworld.samples import ToyWorld
from diptych.toyworld.scene import BACKGROUNDS, CELLS, COLOURS, Object, Scene, Thing, generator, place_one
from diptych.toyworld.shapes import SHAPES, Shape
from diptych.toyworld.statements import KINDS, held_out
from diptych.toyworld.toyeval import ToyPrompt, Verdict, judge, prompts, scene_for

PROMPTS = prompts()


def test_prompts_are_many_distinct_and_held_out() -> None:
    assert len(PROMPTS) >= 140
    assert len({prompt.text for prompt in PROMPTS}) == len({prompt.id for prompt in PROMPTS}) == len(PROMPTS)
    assert set(Counter(prompt.category for prompt in PROMPTS).values()) == {len(PROMPTS) // len(KINDS)}
    assert all(held_out(prompt.statement.key) for prompt in PROMPTS)
    assert prompts() == PROMPTS
    assert prompts(1) != PROMPTS


def test_no_prompt_is_ever_told_in_training() -> None:
    asked = {prompt.text for seed in range(3) for prompt in prompts(seed)}
    told: set[str] = set()
    for seed in range(2):
        world = ToyWorld(seed, 8, text_only=1.0)
        for index in range(1200):
            told.add(world.sample("text_to_image", index).text)
            opening = world.sample("understand", index).messages[0].text
            told.add(opening.removeprefix("scene: ").partition(". ")[0])
    assert len(told) > 1000
    assert not asked & told


@pytest.mark.parametrize("size", [32, 64])
def test_true_images_pass(size: int) -> None:
    verdicts = [judge(render(scene_for(prompt, generator(prompt.id)), size), prompt) for prompt in PROMPTS]
    assert {verdict.category for verdict in verdicts} == set(KINDS)
    for kind in KINDS:
        correct = [verdict.correct for verdict in verdicts if verdict.category == kind]
        assert sum(correct) >= 0.97 * len(correct), kind


def test_noise_fails() -> None:
    rng = torch.Generator().manual_seed(0)
    for prompt in PROMPTS:
        verdict = judge(torch.randn(3, 32, 32, generator=rng), prompt)
        assert not verdict.correct
        assert verdict.reason


def verdict(prompt: ToyPrompt, scene: Scene) -> Verdict:
    return judge(render(scene), prompt)


@pytest.mark.parametrize("prompt", PROMPTS[::3], ids=lambda prompt: prompt.id)
def test_anything_wrong_fails(prompt: ToyPrompt) -> None:
    rng = generator("wrong", prompt.id)
    scene = scene_for(prompt, rng)
    assert verdict(prompt, scene).correct
    for at, found in enumerate(scene.objects):
        rest = scene.objects[:at] + scene.objects[at + 1 :]
        assert "expected" in verdict(prompt, scene.with_objects(rest)).reason, "a missing shape"
        named = {thing.shape for thing in prompt.statement.things}
        other = next(shape for shape in SHAPES if shape not in named)
        assert not verdict(prompt, scene.with_objects((*rest, replace(found, shape=other)))).correct, "a wrong shape"
        if prompt.statement.things[0].colour:
            for colour in COLOURS:
                if colour != found.colour:
                    wrong = scene.with_objects((*rest, replace(found, colour=colour)))
                    assert not verdict(prompt, wrong).correct, f"{colour} for {found.colour}"
    if prompt.background:
        for name in BACKGROUNDS:
            if name != prompt.background:
                assert "background" in verdict(prompt, replace(scene, background=name)).reason
    if prompt.category == "counting" and len(scene.objects) < len(CELLS):
        free = next(cell for cell in range(len(CELLS)) if scene.at(cell) is None)
        more = scene.with_objects((*scene.objects, place_one(rng, scene.objects[0].thing, free)))
        assert "fewer than" in verdict(prompt, more).reason
    if prompt.category in ("position", "color_attribution"):
        one, two = scene.objects
        swapped = (replace(one, x=two.x, y=two.y), replace(two, x=one.x, y=one.y))
        if prompt.category == "position":
            assert not verdict(prompt, scene.with_objects(swapped)).correct
        else:
            crossed = (replace(one, colour=two.colour), replace(two, colour=one.colour))
            assert not verdict(prompt, scene.with_objects(crossed)).correct


def test_other_shapes_beside_the_named_ones_do_no_harm() -> None:
    """GenEval's rule: only counting excludes."""
    prompt = next(prompt for prompt in PROMPTS if prompt.category == "colors")
    scene = scene_for(prompt, generator(0))
    free = next(cell for cell in range(len(CELLS)) if scene.at(cell) is None)
    other: Shape = "cross" if scene.objects[0].shape != "cross" else "circle"
    more = scene.with_objects((*scene.objects, place_one(generator(1), Thing(shape=other), free)))
    assert verdict(prompt, more).correct


def test_a_failed_target_blocks_the_relation() -> None:
    prompt = next(prompt for prompt in PROMPTS if prompt.category == "position" and prompt.statement.things[1].colour)
    target = prompt.statement.things[1]
    scene = scene_for(prompt, generator(2))
    objects = [
        replace(found, colour="green" if target.colour != "green" else "red") if found.shape == target.shape else found
        for found in scene.objects
    ]
    assert "no target for" in verdict(prompt, scene.with_objects(objects)).reason


def test_too_many_prompts_are_refused() -> None:
    with pytest.raises(UserError, match="prompts at most, not 500"):
        prompts(0, 500)


def test_an_empty_cell_is_not_a_shape() -> None:
    prompt = PROMPTS[0]
    bare = Scene(objects=(), background=prompt.background or "gray")
    assert not verdict(prompt, bare).correct
    lone = Object(shape=prompt.include[0].shape, colour="red", x=8, y=8, radius=5)
    assert verdict(prompt, bare.with_objects([lone])).correct
