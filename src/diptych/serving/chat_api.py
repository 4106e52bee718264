"""`/v1/chat/completions`: texts and pictures in; text out, and pictures where `modalities` ask for them."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from PIL import Image
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from diptych.core.draws import Draws, key
from diptych.core.sample import IMAGE_PLACEHOLDER, Message
from diptych.core.tokens import NextToken, likeliest
from diptych.core.tokens import drawn as drawn_token
from diptych.serving.cache import fingerprint
from diptych.serving.errors import ApiError, bad
from diptych.serving.fetching import fetch_picture
from diptych.serving.fields import Field, checked, read_fields, shown
from diptych.serving.images_api import OPTIONS, read_size
from diptych.serving.jobs import Event, Written
from diptych.serving.pictures import DATA_URL, encode, from_data_url, read_picture, to_base64
from diptych.serving.requests import json_body, sse, until_gone
from diptych.serving.service import DrawCall, Made, Service, WriteCall, last

MOST_MESSAGES = 200
MOST_PICTURES = 32
FIELDS = {
    "model": Field(kind="text", high=1000),
    "messages": Field(kind="list"),
    "modalities": Field(kind="list"),
    "max_tokens": Field(kind="integer", low=1, high=32_768),
    "max_completion_tokens": Field(kind="integer", low=1, high=32_768),
    "stop": Field(kind="any"),
    "temperature": Field(kind="number", low=0, high=2),
    "top_p": Field(kind="number", low=0, high=1),
    "seed": Field(kind="integer", low=0, high=2**62),
    "stream": Field(kind="boolean"),
    "stream_options": Field(kind="mapping"),
    "n": Field(kind="integer", low=1),
    "user": Field(kind="text", high=1000),
    "tools": Field(kind="list"),
    "tool_choice": Field(kind="any"),
    # Beyond OpenAI's; of pictures but for `think`.
    "think": Field(kind="boolean"),
    "size": Field(kind="text", high=20),
    "num_inference_steps": Field(kind="integer", low=1, high=1000),
    "guidance_scale": Field(kind="number", low=0, high=1000),
    "image_guidance_scale": Field(kind="number", low=0, high=1000),
    "negative_prompt": Field(kind="text", high=32_000),
}
OF_PICTURES = ("size", *OPTIONS)
USUAL_TOKENS = 256
READ = ("role", "content", "name", "images", "refusal")
EMPTY = ("annotations", "audio", "function_call", "tool_calls")
"""Of a message: what is read or may be there, and what clients send back empty."""
DETAILS = ("auto", "low", "high")
"""Of a picture, as OpenAI's clients send them; it is read whole in any case."""
STREAM_OPTIONS = {"include_usage": Field(kind="boolean"), "include_obfuscation": Field(kind="boolean")}
LONGEST_STOP = 1000
"""Characters of a text that ends an answer."""


@dataclass
class Turns:
    """A conversation as it was sent. pictures: of all turns, in order. last: those of the last one; text: its words."""

    messages: list[Message] = field(default_factory=list[Message])
    pictures: list[Image.Image] = field(default_factory=list[Image.Image])
    files: list[bytes] = field(default_factory=list[bytes])
    last: list[Image.Image] = field(default_factory=list[Image.Image])
    text: str = ""

    def add(self, role: Literal["system", "user", "assistant"], text: str, pictures: list[Image.Image]) -> None:
        """A further message, its pictures before its words."""
        self.messages.append(Message(role=role, text=f"{IMAGE_PLACEHOLDER}\n" * len(pictures) + text))
        self.pictures += pictures
        self.last, self.text = pictures, text

    def shown(self) -> list[Image.Image]:
        """The pictures that a request to draw is about: of the last message, else the latest before it."""
        return self.last or self.pictures[-1:]


class ChatApi:
    """The route."""

    def __init__(self, service: Service) -> None:
        self.service = service

    async def completions(self, request: Request) -> Response:
        """`POST /v1/chat/completions`."""
        fields = read_fields(await json_body(request), FIELDS)
        if fields.get("tools") or "tool_choice" in fields:
            param = "tools" if fields.get("tools") else "tool_choice"
            raise bad(param, "these models call no tools", "unsupported_parameter")
        if fields.get("n", 1) != 1:
            raise bad("n", "one answer is written; ask again for another", "unsupported_parameter")
        if "messages" not in fields:
            raise bad("messages", "they are missing", "missing_parameter")
        model = self.service.models.check(fields.get("model", self.service.models.names[0]))
        draws = draws_pictures(fields.get("modalities", ["text"]))
        for name in OF_PICTURES:
            if name in fields and not draws:
                raise bad(name, 'it is of pictures; ask for them by modalities ["text", "image"]')
        usage = read_stream_options(fields)
        turns = await self._turns(fields["messages"])
        if draws:
            return await self._drawn(request, model, fields, turns, usage)
        return await self._written(request, model, fields, turns, usage)

    # Text

    async def _written(
        self, request: Request, model: str, fields: dict[str, Any], turns: Turns, usage: bool
    ) -> Response:
        longest = token_limit(fields)
        stop = stop_texts(fields.get("stop"))
        seed = fields.get("seed", secrets.randbelow(1 << 31))
        choose = chooser(fields, seed, longest)

        call = WriteCall(
            model=model, messages=turns.messages, pictures=turns.pictures, max_new_tokens=longest, choose=choose,
            stop=stop, think=bool(fields.get("think")),
        )  # fmt: skip
        if fields.get("stream"):
            return sse(request, chunks(model, self.service.write(call), usage), named=False)
        repeats = "seed" in fields or not fields.get("temperature")
        mark = fingerprint("chat", {**fields, "model": model, "messages": repr(turns.messages)}, turns.files)
        body = self.service.cache.get(mark if repeats else None)
        if body is not None:
            self.service.metrics.count("diptych_cache_hits_total")
            return Response(body, media_type="application/json", headers={"x-diptych-cache": "hit"})

        written: Written = await until_gone(request, last(self.service.write(call)))
        message = {"role": "assistant", "content": written.text, "refusal": None}
        counts = token_usage(written.prompt_tokens, written.tokens)
        body = JSONResponse(completion(model, message, written.finish, counts)).body
        self.service.cache.put(mark if repeats else None, body, len(body))
        return Response(body, media_type="application/json")

    # Pictures

    async def _drawn(self, request: Request, model: str, fields: dict[str, Any], turns: Turns, usage: bool) -> Response:
        """The picture that the last turn asks for: of its own pictures, of the latest before, or of its words alone."""
        for name in ("temperature", "top_p", "stop", "max_tokens", "max_completion_tokens"):
            if name in fields:
                raise bad(name, "it is of texts; leave it out where a picture is asked for")
        if not turns.text.strip():
            raise bad("messages", "the last message has no text")
        options = {name: fields[given] for given, name in OPTIONS.items() if given in fields}
        if fields.get("size", "auto") != "auto":
            options["size"] = read_size(fields["size"])
        images = turns.shown()
        if not images and "image_cfg" in options:
            raise bad("image_guidance_scale", "there is no picture in the conversation to go by")
        call = DrawCall(
            model=model, prompt=turns.text, images=images, seed=fields.get("seed"), options=options,
            think=fields.get("think"), words="messages",
        )  # fmt: skip
        if fields.get("stream"):
            return sse(request, self._picture_chunks(model, call, usage), named=False)

        made: Made = await until_gone(request, last(self.service.draw(call)))
        part = await asyncio.to_thread(image_part, made)
        text = made.expansions[0] if made.expansions else ""
        message = {"role": "assistant", "content": text, "refusal": None, "images": [part]}
        return JSONResponse(completion(model, message, "stop", token_usage(made.prompt_tokens, made.drawn.tokens)))

    async def _picture_chunks(self, model: str, call: DrawCall, usage: bool) -> AsyncIterator[dict[str, Any]]:
        name = f"chatcmpl-{secrets.token_hex(12)}"
        begun = False
        async for event in self.service.draw(call):
            if not begun:
                begun = True
                yield chunk(model, name, {"role": "assistant", "content": ""})
            if event.kind == "text":
                yield chunk(model, name, {"content": event.value})
            elif event.kind == "done":
                made: Made = event.value
                part = await asyncio.to_thread(image_part, made)
                yield chunk(model, name, {"images": [part]})
                yield chunk(model, name, {}, "stop")
                if usage:
                    yield usage_chunk(model, name, made.prompt_tokens, made.drawn.tokens)

    # Messages

    async def _turns(self, messages: list[Any]) -> Turns:
        """The conversation, its pictures read."""
        if not messages:
            raise bad("messages", "there are none")
        if len(messages) > MOST_MESSAGES:
            raise bad("messages", f"at most {MOST_MESSAGES}, not {len(messages)}")
        turns = Turns()
        for place, message in enumerate(messages):
            where = f"messages[{place}]"
            if not isinstance(message, Mapping):
                raise bad(where, "it must be an object", "invalid_type")
            roles: dict[str, Literal["system", "user", "assistant"]] = {
                "system": "system", "developer": "system", "user": "user", "assistant": "assistant",
            }  # fmt: skip
            role = roles.get(str(message.get("role")))
            if role is None:
                given = shown(message.get("role"))
                raise bad(f"{where}.role", f"must be system, developer, user or assistant, not {given}")
            for name, value in message.items():
                if name not in (*READ, *EMPTY) or (name in EMPTY and value):
                    raise unknown_at(where, name)
                if name in ("name", "refusal") and not isinstance(value, str | None):
                    raise bad(f"{where}.{name}", f"must be a text, not {shown(value)}", "invalid_type")
            parts = content_parts(message, where)
            text, files, pictures = "", list[bytes](), list[Image.Image]()
            for spot, part in parts:
                kind = part.get("type")
                if kind not in ("text", "image_url") or (kind == "text" and ".images[" in spot):
                    raise bad(spot, "a part is of type text or image_url, and of images image_url alone",
                              "unsupported_content")  # fmt: skip
                for name in part:
                    if name not in ("type", kind):
                        raise unknown_at(spot, name)
                if kind == "text":
                    text += checked(f"{spot}.text", part.get("text"), Field(kind="text"))
                    continue
                files.append(await self._file(part.get("image_url"), f"{spot}.image_url"))
                pictures.append(await asyncio.to_thread(read_picture, files[-1], f"{spot}.image_url"))
                text += f"{IMAGE_PLACEHOLDER}\n"
                if len(turns.pictures) + len(pictures) > MOST_PICTURES:
                    raise bad("messages", f"at most {MOST_PICTURES} pictures")
            if len(text) > 32_000:
                raise bad(where, f"has {len(text):,} characters; at most 32,000 are read", "string_too_long")
            turns.messages.append(Message(role=role, text=text))
            turns.pictures += pictures
            turns.files += files
            turns.last, turns.text = pictures, text.replace(f"{IMAGE_PLACEHOLDER}\n", "")
        if turns.messages[-1].role != "user":
            raise bad("messages", "the last message must be the user's")
        return turns

    async def _file(self, value: Any, where: str) -> bytes:
        """The bytes of a picture that a message shows."""
        url = value.get("url") if isinstance(value, Mapping) else None
        if not isinstance(url, str):
            raise bad(where, "it must be an object with a url", "invalid_type")
        for name in value:
            if name not in ("url", "detail"):
                raise unknown_at(where, name)
        if value.get("detail") not in (None, *DETAILS):
            raise bad(f"{where}.detail", f"must be one of {', '.join(DETAILS)}, not {shown(value['detail'])}")
        remote = url[:8].lower().startswith(("http://", "https://"))
        if remote and self.service.options.urls:
            return await asyncio.to_thread(fetch_picture, url, self.service.options.urls, where)
        if remote:
            raise bad(where, f"addresses are not fetched; send {DATA_URL}png;base64,...", "invalid_image_url")
        return from_data_url(url, where)


def unknown_at(where: str, name: str) -> ApiError:
    """A field of a part of a conversation that is not known."""
    return ApiError(400, f"{where}: unknown parameter {shown(name)}", param=f"{where}.{name}", code="unknown_parameter")


def read_stream_options(fields: Mapping[str, Any]) -> bool:
    """Whether a stream is to end with the count of its tokens."""
    if "stream_options" not in fields:
        return False
    if not fields.get("stream"):
        raise bad("stream_options", "they are of a stream; set stream to true")
    return bool(read_fields(fields["stream_options"], STREAM_OPTIONS, where="stream_options").get("include_usage"))


def content_parts(message: Mapping[str, Any], where: str) -> list[tuple[str, Mapping[str, Any]]]:
    """The parts of a message with their places in the request, its `images` before the others."""
    content = message.get("content")
    if isinstance(content, str):
        if IMAGE_PLACEHOLDER in content:
            raise bad(f"{where}.content", f"it must not hold {IMAGE_PLACEHOLDER}; send pictures as image_url parts")
        content = [{"type": "text", "text": content}]
    parts = [] if content is None else content
    images = message.get("images") or []
    if not isinstance(parts, list):
        raise bad(f"{where}.content", "it must be a text or a list of parts", "invalid_type")
    if not isinstance(images, list):
        raise bad(f"{where}.images", "it must be a list of image_url parts", "invalid_type")
    every: list[tuple[str, Mapping[str, Any]]] = []
    for name, some in (("images", images), ("content", parts)):
        every += [(f"{where}.{name}[{number}]", part) for number, part in enumerate(some)]
    if not every and message.get("role") != "assistant":
        raise bad(f"{where}.content", "it is missing", "missing_parameter")
    for spot, part in every:
        if not isinstance(part, Mapping):
            raise bad(spot, f"it must be an object, not {shown(part)}", "invalid_type")
        if IMAGE_PLACEHOLDER in str(part.get("text", "")):
            raise bad(f"{where}.content", f"it must not hold {IMAGE_PLACEHOLDER}; send pictures as image_url parts")
    return every


def draws_pictures(modalities: list[Any]) -> bool:
    """Whether a picture is asked for."""
    for modality in modalities:
        if modality not in ("text", "image"):
            raise bad("modalities", f"they are text and image, not {shown(modality)}")
    if not modalities:
        raise bad("modalities", "there are none")
    return "image" in modalities


def token_limit(fields: Mapping[str, Any]) -> int:
    """Longest answer, in tokens."""
    if "max_tokens" in fields and "max_completion_tokens" in fields:
        raise bad("max_tokens", "give max_completion_tokens or max_tokens, not both")
    return fields.get("max_completion_tokens", fields.get("max_tokens", USUAL_TOKENS))


def stop_texts(value: Any) -> list[str]:
    """Texts that end an answer, at most four."""
    texts = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(texts, list) or len(texts) > 4 or not all(isinstance(text, str) and text for text in texts):
        raise bad("stop", "it must be a text, or a list of at most four texts", "invalid_type")
    if max(map(len, texts), default=0) > LONGEST_STOP:
        raise bad("stop", f"a text has more than {LONGEST_STOP:,} characters", "string_too_long")
    return texts


def chooser(fields: Mapping[str, Any], seed: int, longest: int) -> NextToken:
    """How tokens are chosen: the likeliest at temperature 0, which is the default here."""
    temperature, top_p = fields.get("temperature", 0), fields.get("top_p", 1.0)
    if not temperature:
        if top_p < 1:
            raise bad("top_p", "it has no effect at temperature 0; give a temperature")
        return likeliest
    uniform = Draws([key(seed, "text")]).uniform("text", longest)
    return drawn_token(temperature, uniform, top_p)


def completion(model: str, message: dict[str, Any], finish: str, usage: dict[str, int]) -> dict[str, Any]:
    """A whole answer."""
    choice = {"index": 0, "message": message, "finish_reason": finish, "logprobs": None}
    return {
        "id": f"chatcmpl-{secrets.token_hex(12)}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": model,
        "choices": [choice],
        "usage": usage,
    }


def chunk(model: str, name: str, delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
    """A piece of an answer."""
    return {
        "id": name,
        "object": "chat.completion.chunk",
        "created": int(time.time()),
        "model": model,
        "choices": [{"index": 0, "delta": delta, "finish_reason": finish, "logprobs": None}],
    }


async def chunks(model: str, events: AsyncIterator[Event], usage: bool) -> AsyncIterator[dict[str, Any]]:
    """A text, piece by piece."""
    name = f"chatcmpl-{secrets.token_hex(12)}"
    begun = False
    async for event in events:
        if event.kind in ("started", "text", "done") and not begun:
            begun = True
            yield chunk(model, name, {"role": "assistant", "content": ""})
        if event.kind == "text":
            yield chunk(model, name, {"content": event.value})
        if event.kind == "done":
            written: Written = event.value
            yield chunk(model, name, {}, written.finish)
            if usage:
                yield usage_chunk(model, name, written.prompt_tokens, written.tokens)


def usage_chunk(model: str, name: str, read: int, written: int) -> dict[str, Any]:
    """The last piece of a stream whose tokens are to be counted."""
    return {**chunk(model, name, {}), "choices": [], "usage": token_usage(read, written)}


def token_usage(read: int, written: int) -> dict[str, int]:
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}


def image_part(made: Made) -> dict[str, Any]:
    """A picture as a part of a message."""
    data = encode(made.images[0][-1], "png", None, made.abouts[0])
    return {"type": "image_url", "image_url": {"url": f"{DATA_URL}png;base64,{to_base64(data)}"}}
