"""Conversations: what is remembered, what is streamed, and what is not."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from diptych.core.errors import UserError
from diptych.core.sample import Message
from diptych.data.imaging import from_pil
from diptych.inference.engine import Engine
from diptych.recipes.load import load


@pytest.fixture(scope="module", params=["toy/iomm", "toy/bagel", "toy/mllm"])
def engine(request: pytest.FixtureRequest) -> Engine:
    return load(request.param)


def picture(color: str) -> Image.Image:
    return Image.new("RGB", (32, 32), color)


def test_a_conversation_is_remembered_and_streamed(engine: Engine) -> None:
    chat = engine.chat(max_new_tokens=12)
    assert repr(chat) == "Chat()"
    question, red, blue = "what color is the background?", picture("red"), picture("blue")
    first = chat.say(question, red)
    assert first == engine.ask(red, question, max_new_tokens=12)
    assert [message.role for message in chat.history] == ["user", "assistant"]
    pieces = list(chat.stream("and here?", blue))
    told = [
        Message(role="user", text=f"<image>\n{question}"),
        Message(role="assistant", text=first),
        Message(role="user", text="<image>\nand here?"),
    ]
    shown = [from_pil(red), from_pil(blue)]
    (expected,) = engine.system.generate_text([told], [shown], max_new_tokens=12)
    assert "".join(pieces) == expected
    assert len(pieces) > 1 or len(expected.split()) <= 1
    assert chat.history == [*told, Message(role="assistant", text=expected)]
    assert repr(chat).splitlines()[-1] == f"assistant: {expected}"


def test_a_turn_that_fails_or_is_left_is_forgotten(tiny_model: Path) -> None:
    chat = load(str(tiny_model)).chat(max_new_tokens=8)
    with pytest.raises(UserError, match="the turn is empty"):
        chat.say(" ")
    with pytest.raises(UserError, match="would be cut"):
        chat.say("red " * 400)
    stream = chat.stream("yes no?")
    next(stream, "")
    stream.close()
    assert chat.history == []
