"""`/v1/images`: pictures from a prompt, and from pictures with an instruction and a mask, whole or as a stream."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from diptych.serving.cache import fingerprint
from diptych.serving.errors import ApiError, bad
from diptych.serving.fields import Field, read_fields
from diptych.serving.jobs import Event
from diptych.serving.pictures import encode, read_mask, read_picture, to_base64
from diptych.serving.requests import form_body, json_body, sse, until_gone
from diptych.serving.service import QUALITIES, DrawCall, Made, Service, last

MOST_IMAGES = 8
"""References of an edit."""
FIELDS = {
    "prompt": Field(kind="text", high=32_000),
    "model": Field(kind="text", high=1000),
    "n": Field(kind="integer", low=1, high=10),
    "size": Field(kind="text", high=20),
    "quality": Field(kind="text", choices=tuple(QUALITIES)),
    "output_format": Field(kind="text", choices=("png", "webp", "jpeg")),
    "output_compression": Field(kind="integer", low=0, high=100),
    "background": Field(kind="text", choices=("auto", "opaque", "transparent")),
    "response_format": Field(kind="text", choices=("b64_json", "url")),
    "stream": Field(kind="boolean"),
    "partial_images": Field(kind="integer", low=0, high=3),
    "user": Field(kind="text", high=1000),
    # Beyond OpenAI's.
    "seed": Field(kind="integer", low=0, high=2**62),
    "num_inference_steps": Field(kind="integer", low=1, high=1000),
    "guidance_scale": Field(kind="number", low=0, high=1000),
    "negative_prompt": Field(kind="text", high=32_000),
    "think": Field(kind="boolean"),
    "sampling": Field(kind="mapping"),
    "noise": Field(kind="list"),
    "scales": Field(kind="text", high=200),
}
EDIT_FIELDS = {**FIELDS, "image_guidance_scale": Field(kind="number", low=0, high=1000)}
FILES = ("image", "image[]", "mask")
OPTIONS = {
    "num_inference_steps": "steps",
    "guidance_scale": "cfg",
    "image_guidance_scale": "image_cfg",
    "negative_prompt": "negative",
}
AT_ONCE = 128 * 128
"""Pixels of an answer that are written between two events of the server; more are in a thread beside it."""
KEPT_FILES = 64
"""Pictures that are kept for `response_format: url`."""


class Files:
    """Pictures that answers name by address, the oldest forgotten first."""

    def __init__(self) -> None:
        self._kept: OrderedDict[str, tuple[bytes, str]] = OrderedDict()

    def put(self, data: bytes, kind: str) -> str:
        """Keep a picture; its name cannot be guessed."""
        name = f"{secrets.token_urlsafe(24)}.{kind}"
        self._kept[name] = (data, f"image/{kind}")
        if len(self._kept) > KEPT_FILES:
            self._kept.popitem(last=False)
        return name

    async def get(self, request: Request) -> Response:
        """`GET /v1/files/NAME`."""
        entry = self._kept.get(request.path_params["name"])
        if entry is None:
            raise ApiError(404, "this picture is not kept any more; ask for b64_json", code="file_not_found")
        return Response(entry[0], media_type=entry[1])


class ImagesApi:
    """The routes. files: where pictures wait for `response_format: url`."""

    def __init__(self, service: Service, files: Files) -> None:
        self.service, self.files = service, files

    async def generations(self, request: Request) -> Response:
        """`POST /v1/images/generations`."""
        fields = read_fields(await json_body(request), FIELDS)
        return await self._answer(request, "image_generation", fields, [], None)

    async def edits(self, request: Request) -> Response:
        """`POST /v1/images/edits`."""
        values, uploads = await form_body(request, FILES)
        fields = read_fields(values, EDIT_FIELDS, form=True)
        pictures = [data for name, data in uploads if name in ("image", "image[]")]
        masks = [data for name, data in uploads if name == "mask"]
        if not pictures:
            raise bad("image", "a picture to edit is missing", "missing_parameter")
        if len(pictures) > MOST_IMAGES:
            raise bad("image", f"at most {MOST_IMAGES} pictures, not {len(pictures)}")
        if len(masks) > 1:
            raise bad("mask", "at most one mask")
        return await self._answer(request, "image_edit", fields, pictures, masks[0] if masks else None)

    async def variations(self, request: Request) -> Response:
        """`POST /v1/images/variations`: gone from OpenAI's API, and never here."""
        raise ApiError(410, "variations are not made; use /v1/images/edits with a prompt", code="endpoint_removed")

    async def _answer(
        self, request: Request, kind: str, fields: dict[str, Any], pictures: list[bytes], mask: bytes | None
    ) -> Response:
        images = [await asyncio.to_thread(read_picture, data, "image") for data in pictures]
        kept = None if mask is None else await asyncio.to_thread(read_mask, mask, "mask", images[0])
        call, form = draw_call(self.service, fields, images, kept), read_form(fields)
        if fields.get("stream"):
            return sse(request, self._events(kind, call, form, request))
        files = [*pictures, *([] if mask is None else [mask])]
        repeats = "seed" in fields or "noise" in fields
        key = fingerprint(kind, {**fields, "model": call.model}, files) if repeats else None
        body = self.service.cache.get(key) if form.response == "b64_json" else None
        if body is not None:
            self.service.metrics.count("diptych_cache_hits_total")
            return Response(body, media_type="application/json", headers={"x-diptych-cache": "hit"})
        made: Made = await until_gone(request, last(self.service.draw(call)))
        # A thread of its own costs more than small pictures take to be written.
        if pixels(made) <= AT_ONCE:
            values = self._body(request, made, form)
        else:
            values = await asyncio.to_thread(self._body, request, made, form)
        body = JSONResponse(values).body
        if form.response == "b64_json":
            self.service.cache.put(key, body, len(body))
        return Response(body, media_type="application/json")

    def _body(self, request: Request, made: Made, form: Form) -> dict[str, Any]:
        begun = time.monotonic()
        data: list[dict[str, Any]] = []
        for place, (scales, about) in enumerate(zip(made.images, made.abouts, strict=True)):
            for image in scales:
                row: dict[str, Any] = {"seed": made.seeds[place]} if made.seeds else {}
                file = encode(image, form.kind, form.compression, about)
                if form.response == "url":
                    row["url"] = str(request.base_url) + f"v1/files/{self.files.put(file, form.kind)}"
                else:
                    row["b64_json"] = to_base64(file)
                if made.expansions:
                    row["revised_prompt"] = made.expansions[place]
                data.append(row)
        self.service.metrics.seconds("encode", time.monotonic() - begun)
        return {"created": int(time.time()), "data": data, **shared(made, form)}

    async def _events(self, kind: str, call: DrawCall, form: Form, request: Request) -> AsyncIterator[dict[str, Any]]:
        """The events of a stream."""
        numbers: dict[int, int] = {}
        async for event in self.service.draw(call):
            if event.kind == "partial":
                numbers[event.image] = numbers.get(event.image, -1) + 1
                yield await asyncio.to_thread(partial_event, kind, event, numbers[event.image], form)
            elif event.kind == "done":
                made: Made = event.value
                for place, (scales, about) in enumerate(zip(made.images, made.abouts, strict=True)):
                    file = await asyncio.to_thread(encode, scales[-1], form.kind, form.compression, about)
                    yield {
                        "type": f"{kind}.completed",
                        "b64_json": to_base64(file),
                        "created_at": int(time.time()),
                        "image_index": place,
                        **({"seed": made.seeds[place]} if made.seeds else {}),
                        **shared(made, form),
                    }


class Form:
    """How pictures are answered: format, quality of those with loss, and whether as data or address."""

    def __init__(self, kind: str, compression: int | None, response: str) -> None:
        self.kind, self.compression, self.response = kind, compression, response


def draw_call(
    service: Service, fields: Mapping[str, Any], images: Sequence[Image.Image] = (), mask: np.ndarray | None = None
) -> DrawCall:
    """What checked fields ask for, of these pictures and with this mask."""
    prompt = fields.get("prompt")
    if prompt is None:
        raise bad("prompt", "it is missing", "missing_parameter")
    if not prompt.strip():
        raise bad("prompt", "it is empty")
    if fields.get("background") == "transparent":
        raise bad("background", "pictures are opaque; leave it out")
    if fields.get("partial_images") and not fields.get("stream"):
        raise bad("partial_images", "they come in a stream; set stream to true")
    options = {name: fields[field] for field, name in OPTIONS.items() if field in fields}
    if fields.get("size", "auto") != "auto":
        options["size"] = read_size(fields["size"])
    sampling = fields.get("sampling", {})
    twice = next((name for name in options if name in sampling), None)
    if twice is not None:
        raise bad(f"sampling.{twice}", "it is given by a field of its own already; leave one of them out")
    options |= sampling
    noise = fields.get("noise")
    n = fields.get("n", 1)
    if noise is not None and "seed" in fields:
        raise bad("noise", "it stands in place of a seed; leave one of them out")
    if noise is not None and (len(noise) != n or not all(type(key) is int and abs(key) < 1 << 64 for key in noise)):
        raise bad("noise", f"it must be a list of {n} whole numbers of 64 bits, one for each image")
    return DrawCall(
        model=service.models.check(fields.get("model", service.models.names[0])),
        prompt=prompt,
        images=images,
        mask=mask,
        n=n,
        seed=fields.get("seed"),
        noise=noise,
        options=options,
        quality=fields.get("quality", "auto"),
        think=fields.get("think"),
        scales=fields.get("scales", "last"),
        partials=fields.get("partial_images", 0) if fields.get("stream") else 0,
    )


def read_form(fields: Mapping[str, Any]) -> Form:
    """The form of the answer that checked fields ask for."""
    kind = fields.get("output_format", "png")
    if "output_compression" in fields and kind == "png":
        raise bad("output_compression", "PNG files are not compressed with loss; ask for webp or jpeg")
    if fields.get("stream") and fields.get("response_format") == "url":
        raise bad("response_format", "a stream brings pictures as b64_json")
    return Form(kind, fields.get("output_compression"), fields.get("response_format", "b64_json"))


def partial_event(kind: str, event: Event, number: int, form: Form) -> dict[str, Any]:
    """An estimate of the final picture."""
    image = event.value
    return {
        "type": f"{kind}.partial_image",
        "b64_json": to_base64(encode(image, form.kind, form.compression)),
        "partial_image_index": number,
        "image_index": event.image,
        "created_at": int(time.time()),
        "output_format": form.kind,
        "size": f"{image.width}x{image.height}",
        "quality": "auto",
        "background": "opaque",
    }


def shared(made: Made, form: Form) -> dict[str, Any]:
    """What every answer says of its pictures."""
    image = made.images[0][-1]
    tokens, words = made.drawn.tokens, made.prompt_tokens
    return {
        "output_format": form.kind,
        "size": f"{image.width}x{image.height}",
        "quality": "auto",
        "background": "opaque",
        "usage": {
            "input_tokens": words,
            "output_tokens": tokens,
            "total_tokens": words + tokens,
            "input_tokens_details": {"text_tokens": words, "image_tokens": 0},
        },
    }


def pixels(made: Made) -> int:
    """Of all pictures of an answer."""
    return sum(image.width * image.height for scales in made.images for image in scales)


def read_size(text: str) -> tuple[int, int]:
    """ "512x768", width before height as in OpenAI's API, as (height, width)."""
    sides = text.lower().split("x")
    if len(sides) != 2 or not all(side.isascii() and side.isdigit() and 0 < int(side) <= 16384 for side in sides):
        raise bad("size", f"must be auto, or width x height as in 1024x768, not {text!r}")
    return int(sides[1]), int(sides[0])
