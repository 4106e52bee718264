"""Pictures and edits of the API, as the official client asks for them, against a server process."""

from __future__ import annotations

import http.client
import io
import time
from typing import Any

import numpy as np
import openai
import pytest
from PIL import Image

import diptych
from diptych.inference.provenance import carried
from serving.asking import PROMPT, Client, get, levels, picture_of, png
from serving_process import Running

# Pictures


def test_a_picture_is_that_of_the_library(client: Client, drawn: Image.Image) -> None:
    answer = client.images.generate(prompt=PROMPT, model="toy/iomm", extra_body={"seed": 7})
    assert np.abs(levels(picture_of(answer.data[0])) - levels(drawn)).max() <= 1
    assert (answer.output_format, answer.size, answer.background) == ("png", "32x32", "opaque")
    assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens > 0
    assert abs(answer.created - time.time()) < 100


def test_answers_carry_the_id_of_the_request(client: Client) -> None:
    answer = client.images.with_raw_response.generate(prompt=PROMPT, extra_body={"num_inference_steps": 1})
    assert answer.headers["x-request-id"].startswith("req_")
    assert answer.parse()._request_id == answer.headers["x-request-id"]


def test_n_pictures_have_the_seeds_that_follow(client: Client) -> None:
    both = client.images.generate(prompt=PROMPT, n=2, extra_body={"seed": 7, "num_inference_steps": 4})
    second = client.images.generate(prompt=PROMPT, extra_body={"seed": 8, "num_inference_steps": 4})
    assert [row.model_extra["seed"] for row in both.data] == [7, 8]
    assert np.abs(levels(picture_of(both.data[1])) - levels(picture_of(second.data[0]))).max() <= 1
    assert np.abs(levels(picture_of(both.data[0])) - levels(picture_of(both.data[1]))).max() > 10


def test_without_a_seed_pictures_differ_and_say_theirs(client: Client) -> None:
    one, two = (client.images.generate(prompt=PROMPT, extra_body={"num_inference_steps": 2}).data[0] for _ in range(2))
    assert one.model_extra["seed"] != two.model_extra["seed"]
    assert one.b64_json != two.b64_json


def test_a_png_carries_what_makes_it_again(client: Client) -> None:
    extra = {"seed": 5, "num_inference_steps": 3, "guidance_scale": 2.5, "negative_prompt": "green"}
    about = carried(picture_of(client.images.generate(prompt=PROMPT, extra_body=extra).data[0]))
    assert (about["prompt"], about["seed"], about["model"]) == (PROMPT, 5, "toy/iomm")
    assert (about["settings"]["steps"], about["settings"]["cfg"], about["settings"]["negative"]) == (3, 2.5, "green")


@pytest.mark.parametrize(
    "extra", [{"num_inference_steps": 3}, {"guidance_scale": 6.0}, {"negative_prompt": "red"}, {"think": False}]
)
def test_fields_beyond_openai_change_the_picture(client: Client, extra: dict[str, Any], drawn: Image.Image) -> None:
    prompt = {"think": "a circle"}.get(next(iter(extra)), PROMPT)
    plain = client.images.generate(prompt=prompt, extra_body={"seed": 7}).data[0]
    changed = client.images.generate(prompt=prompt, extra_body={"seed": 7, **extra}).data[0]
    assert np.abs(levels(picture_of(plain)) - levels(picture_of(changed))).max() > 2


def test_quality_is_the_number_of_steps(client: Client) -> None:
    low = client.images.generate(prompt=PROMPT, quality="low", extra_body={"seed": 7})
    high = client.images.generate(prompt=PROMPT, quality="high", extra_body={"seed": 7})
    steps = [carried(picture_of(answer.data[0]))["settings"]["steps"] for answer in (low, high)]
    assert steps == [4, 16]


def test_size_is_width_by_height(client: Client) -> None:
    answer = client.images.generate(prompt=PROMPT, size="24x32", extra_body={"num_inference_steps": 1})
    assert picture_of(answer.data[0]).size == (24, 32)
    assert answer.size == "24x32"


@pytest.mark.parametrize(("kind", "compression"), [("png", None), ("jpeg", 50), ("webp", 80)])
def test_formats(client: Client, kind: Any, compression: int | None) -> None:
    more = {} if compression is None else {"output_compression": compression}
    answer = client.images.generate(prompt=PROMPT, output_format=kind, extra_body={"num_inference_steps": 1}, **more)
    assert picture_of(answer.data[0]).format == {"png": "PNG", "jpeg": "JPEG", "webp": "WEBP"}[kind]
    assert answer.output_format == kind


def test_compression_makes_files_smaller(client: Client) -> None:
    sizes = [
        len(client.images.generate(prompt=PROMPT, output_format="jpeg", output_compression=q, extra_body={"seed": 1})
            .data[0].b64_json)
        for q in (5, 95)
    ]  # fmt: skip
    assert sizes[0] < sizes[1]


def test_a_picture_by_address(server: Running, client: Client) -> None:
    answer = client.images.generate(prompt=PROMPT, response_format="url", extra_body={"num_inference_steps": 1})
    url = answer.data[0].url
    assert url.startswith(server.address)
    connection = http.client.HTTPConnection("127.0.0.1", server.port)
    connection.request("GET", url.removeprefix(server.address))
    assert Image.open(io.BytesIO(connection.getresponse().read())).size == (32, 32)
    connection.close()
    assert get(server, "/v1/files/other.png")[0] == 404


def test_a_stream_brings_estimates_and_the_picture(client: Client, drawn: Image.Image) -> None:
    events = list(client.images.generate(prompt=PROMPT, stream=True, partial_images=3, extra_body={"seed": 7}))
    assert [event.type for event in events] == ["image_generation.partial_image"] * 3 + ["image_generation.completed"]
    assert [event.partial_image_index for event in events[:3]] == [0, 1, 2]
    final = levels(picture_of(events[-1]))
    assert np.abs(final - levels(drawn)).max() <= 1
    distances = [np.abs(levels(picture_of(event)) - final).mean() for event in events[:3]]
    assert distances[0] > distances[2], f"estimates come nearer: {distances}"
    assert events[-1].usage.output_tokens > 0


def test_a_stream_without_estimates(client: Client) -> None:
    events = list(client.images.generate(prompt=PROMPT, stream=True, extra_body={"num_inference_steps": 2}))
    assert [event.type for event in events] == ["image_generation.completed"]


def test_an_error_of_a_stream_has_its_status(client: Client) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.generate(prompt=PROMPT, stream=True, size="33x32")
    assert caught.value.param == "size"


# Edits


def test_an_edit_is_that_of_the_library(client: Client, drawn: Image.Image) -> None:
    wanted = diptych.load("toy/ovis-u1", device="cpu").edit(drawn, "make the background navy", seed=[3])[0]
    answer = client.images.edit(
        model="toy/ovis-u1", image=("a.png", png(drawn)), prompt="make the background navy", extra_body={"seed": 3}
    )
    assert np.abs(levels(picture_of(answer.data[0])) - levels(wanted)).max() <= 1


@pytest.mark.parametrize("size", [None, "auto"])
def test_an_edit_has_the_shape_of_its_image(client: Client, size: Any) -> None:
    picture = Image.new("RGB", (48, 32), "red")
    options: dict[str, Any] = {} if size is None else {"size": size}
    answer = client.images.edit(
        model="toy/ovis-u1",
        image=("a.png", png(picture)),
        prompt="make it green",
        extra_body={"num_inference_steps": 1},
        **options,
    )
    assert picture_of(answer.data[0]).size == (32, 24)  # Ovis-U1's canvas, of at most 32x32 in area here


def test_image_guidance_changes_an_edit(client: Client, drawn: Image.Image) -> None:
    def edited(scale: float) -> np.ndarray:
        extra = {"seed": 3, "image_guidance_scale": scale, "num_inference_steps": 4}
        answer = client.images.edit(
            model="toy/ovis-u1", image=png(drawn), prompt="make the background navy", extra_body=extra
        )
        return levels(picture_of(answer.data[0]))

    assert np.abs(edited(1.0) - edited(3.0)).max() > 2


def test_several_pictures_are_read(client: Client, drawn: Image.Image) -> None:
    other = Image.new("RGB", drawn.size, "navy")
    extra = {"seed": 3, "num_inference_steps": 4}

    def edited(*images: Image.Image) -> np.ndarray:
        files = [(f"{n}.png", png(image)) for n, image in enumerate(images)]
        answer = client.images.edit(model="toy/ovis-u1", image=files, prompt="make it green", extra_body=extra)
        return levels(picture_of(answer.data[0]))

    assert np.abs(edited(drawn) - edited(drawn, other)).max() > 2


def test_a_mask_keeps_what_is_opaque(client: Client, drawn: Image.Image) -> None:
    mask = Image.new("RGBA", drawn.size, (0, 0, 0, 255))
    mask.paste((0, 0, 0, 0), (16, 0, 32, 32))
    answer = client.images.edit(
        model="toy/ovis-u1", image=png(drawn), mask=png(mask), prompt="make the background navy", extra_body={"seed": 3}
    )
    made, before = levels(picture_of(answer.data[0])), levels(drawn)
    assert np.abs(made[:, :16] - before[:, :16]).max() <= 1
    assert np.abs(made[:, 16:] - before[:, 16:]).max() > 30


def test_an_edit_streams(client: Client, drawn: Image.Image) -> None:
    events = list(
        client.images.edit(
            model="toy/ovis-u1", image=png(drawn), prompt="make the background navy", stream=True, partial_images=1
        )
    )
    assert [event.type for event in events] == ["image_edit.partial_image", "image_edit.completed"]


def test_variations_are_gone(client: Client, drawn: Image.Image) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        client.post("/images/variations", cast_to=object, body={})
    assert caught.value.status_code == 410
    assert "/v1/images/edits" in caught.value.message
