"""Chats of the API, as the official client has them, against a server process."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

import diptych
from diptych.inference.provenance import carried
from serving.asking import PROMPT, Client, data_url, levels


def ask(image: Image.Image, text: str) -> list[Any]:
    part = {"type": "image_url", "image_url": {"url": data_url(image)}}
    return [{"role": "user", "content": [part, {"type": "text", "text": text}]}]


def test_an_answer_is_that_of_the_library(client: Client, drawn: Image.Image) -> None:
    wanted = diptych.load("toy/ovis-u1", device="cpu").ask(drawn, "what color is the circle?")
    answer = client.chat.completions.create(model="toy/ovis-u1", messages=ask(drawn, "what color is the circle?"))
    assert answer.choices[0].message.content == wanted
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens > 0 < answer.usage.prompt_tokens


def test_an_answer_streams(client: Client, drawn: Image.Image) -> None:
    messages = ask(drawn, "describe the image.")
    whole = client.chat.completions.create(model="toy/ovis-u1", messages=messages, seed=1)
    stream = client.chat.completions.create(
        model="toy/ovis-u1", messages=messages, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert len(chunks) > 3
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_answers_are_cut_at_their_longest(client: Client, drawn: Image.Image, name: str) -> None:
    answer = client.chat.completions.create(
        model="toy/ovis-u1", messages=ask(drawn, "describe the image."), **{name: 2}
    )
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 2


def test_stop_texts_end_answers(client: Client, drawn: Image.Image) -> None:
    messages = ask(drawn, "describe the image.")
    whole = client.chat.completions.create(model="toy/ovis-u1", messages=messages).choices[0].message.content
    word = whole.split()[2]
    cut = client.chat.completions.create(model="toy/ovis-u1", messages=messages, stop=[word, "never"]).choices[0]
    assert cut.message.content == whole[: whole.index(word)]
    assert cut.finish_reason == "stop"


def test_temperature_draws_by_the_seed(client: Client, drawn: Image.Image) -> None:
    def said(seed: int, **more: Any) -> str:
        return (
            client.chat.completions.create(
                model="toy/ovis-u1", messages=ask(drawn, "describe the image."), temperature=2.0, seed=seed, **more
            )
            .choices[0]
            .message.content
        )

    greedy = client.chat.completions.create(model="toy/ovis-u1", messages=ask(drawn, "describe the image."))
    assert said(1) == said(1)
    assert len({said(seed) for seed in range(6)}) > 1
    assert said(1, top_p=0.0) == greedy.choices[0].message.content


def test_a_conversation_draws_and_edits(client: Client) -> None:
    first = client.chat.completions.create(
        model="toy/ovis-u1", messages=[{"role": "user", "content": PROMPT}], seed=4,
        extra_body={"modalities": ["text", "image"]},
    ).choices[0].message  # fmt: skip
    url = first.model_extra["images"][0]["image_url"]["url"]
    picture = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))
    turns = [
        {"role": "user", "content": PROMPT},
        {"role": "assistant", "content": first.content, "images": first.model_extra["images"]},
        {"role": "user", "content": "make the background navy"},
    ]
    second = client.chat.completions.create(
        model="toy/ovis-u1", messages=turns, seed=4, extra_body={"modalities": ["text", "image"]}
    ).choices[0].message  # fmt: skip
    made = Image.open(
        io.BytesIO(base64.b64decode(second.model_extra["images"][0]["image_url"]["url"].partition(",")[2]))
    )
    wanted = diptych.load("toy/ovis-u1", device="cpu").edit(picture, "make the background navy", seed=[4])[0]
    assert np.abs(levels(made) - levels(wanted)).max() <= 1
    assert carried(made)["instruction"] == "make the background navy"


def test_a_picture_of_a_chat_streams(client: Client) -> None:
    chunks = list(
        client.chat.completions.create(
            model="toy/iomm", messages=[{"role": "user", "content": "a circle"}], stream=True, seed=1,
            extra_body={"modalities": ["text", "image"]},
        )
    )  # fmt: skip
    images = [chunk.choices[0].delta.model_extra.get("images") for chunk in chunks]
    assert len([each for each in images if each]) == 1
    assert chunks[-1].choices[0].finish_reason == "stop"
