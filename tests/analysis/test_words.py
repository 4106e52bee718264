"""Words of prompts: categories, marks, and the tokens they become."""

from __future__ import annotations

import pytest

from diptych.analysis import words
from diptych.core.errors import UserError
from diptych.parts.backbones.toy_tokenizer import train_tokenizer
from diptych.reports import analysis as reports


def kinds(line: str) -> dict[str, str]:
    return {word.text: word.category for word in words.parse(line).words}


def test_words_are_told_apart() -> None:
    found = kinds("A photo of a tie right of a brown baseball bat")
    assert found == {
        "A": "other", "photo": "other", "of": "other", "a": "other", "tie": "object", "right": "position",
        "brown": "color", "baseball": "object", "bat": "object",
    }  # fmt: skip
    assert kinds("an orange cup")["orange"] == "color"
    assert kinds("a cup left of an orange")["orange"] == "object"
    assert kinds("three benches and two crosses")["benches"] == kinds("two crosses")["crosses"] == "object"


def test_marks_say_it_instead() -> None:
    prompt = words.parse("a {violin case|object} {atop|position} a {crimson|color} cat")
    assert prompt.text == "a violin case atop a crimson cat"
    assert [(word.text, word.category) for word in prompt.words if word.category != "other"] == [
        ("violin", "object"), ("case", "object"), ("atop", "position"), ("crimson", "color"),
    ]  # fmt: skip
    with pytest.raises(UserError, match=r"unknown category 'colour'\. Did you mean 'color'"):
        words.parse("a {red|colour} door")
    with pytest.raises(UserError, match="has no words"):
        words.parse("...")


@pytest.mark.parametrize("line", [*words.PHOTO_PROMPTS, *words.TOY_PROMPTS])
def test_diagnostic_prompts_name_two_colors_two_objects_and_a_position(line: str) -> None:
    found = [word.category for word in words.parse(line).words]
    assert (found.count("color"), found.count("position")) == (2, 1)
    assert found.count("object") in (2, 3)


def test_there_are_twenty() -> None:
    assert len(set(words.PHOTO_PROMPTS)) == len(set(words.TOY_PROMPTS)) == 20


def test_tokens_belong_to_words() -> None:
    tokenizer = train_tokenizer(["a red circle left of a blue square"] * 3, 320)
    prompt = words.parse("a reddish circle")

    def decode(ids: object) -> str:
        return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))  # type: ignore[arg-type]

    ids = tokenizer("draw: a reddish circle!", add_special_tokens=False)["input_ids"]
    owners = words.places(ids, decode, prompt)
    for number, word in enumerate(prompt.words):
        text = "".join(decode([id]) for id, owner in zip(ids, owners, strict=True) if owner == number)
        assert text.strip() == word.text
    assert owners[0] is None
    assert owners[-1] is None
    with pytest.raises(UserError, match="is not in what the model reads"):
        words.places(ids, decode, words.parse("another prompt"))


def test_reports_know_the_categories() -> None:
    assert reports.CATEGORIES == words.CATEGORIES
