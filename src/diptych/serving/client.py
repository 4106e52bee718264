"""A model that a server holds, used as a local one: `diptych.connect("http://127.0.0.1:8000")`."""

from __future__ import annotations

import base64
import http.client
import io
import json
import os
import urllib.parse
from collections.abc import Sequence
from typing import Any

from PIL import Image

from diptych.core.draws import key
from diptych.core.errors import UserError
from diptych.core.web import checked_key, checked_url
from diptych.data.imaging import AnyImage, as_image, image_list
from diptych.inference.requests import noise_keys

KEY = "DIPTYCH_API_KEY"
SECONDS = 900.0


class RemoteModel:
    """One of a server's models, with the calls of `Engine` that ask for pictures and answers.

    Args:
        address: of the server, as in http://127.0.0.1:8000. model: its name there; the first when None.
        key: that the server asks for; that of the variable DIPTYCH_API_KEY when None.

    Raises:
        UserError: no server there, or no such model.
    """

    def __init__(self, address: str, model: str | None = None, key: str | None = None) -> None:
        parts = urllib.parse.urlsplit(checked_url(address, "the server"))
        self._secure, self._place = parts.scheme == "https", parts.netloc
        self._path = parts.path.rstrip("/").removesuffix("/v1")
        self._key = checked_key(os.environ.get(KEY, ""), KEY) if key is None else checked_key(key, "key")
        self.models: list[str] = [row["id"] for row in self._call("GET", "/v1/models")["data"]]
        self.name = self.models[0] if model is None else model
        if model is not None:
            self._call("GET", f"/v1/models/{urllib.parse.quote(model)}")

    def __repr__(self) -> str:
        return f"RemoteModel({self.name!r} at {self._place})"

    def generate(
        self,
        prompt: str | Sequence[str],
        *,
        n: int = 1,
        seed: int | Sequence[int] = 0,
        expansions: list[str] | None = None,
        abouts: list[dict[str, str]] | None = None,
        **options: Any,
    ) -> list[Image.Image]:
        """Images for one prompt or several, as `Engine.generate` makes them: the same options and noise.

        Args:
            abouts: a list that is extended by what the file of each image says of how it was made.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        images: list[Image.Image] = []
        for text, keys in zip(prompts, noise_keys(seed, range(len(prompts)), n), strict=True):
            body = {"model": self.name, "prompt": text, "n": n, **noise_fields(seed, keys), **asked(options)}
            images += self._pictures(
                "/v1/images/generations", json.dumps(body).encode(), expansions=expansions, abouts=abouts
            )
        return images

    def edit(
        self,
        image: AnyImage | Sequence[AnyImage],
        instruction: str,
        *,
        n: int = 1,
        seed: int | Sequence[int] = 0,
        **options: Any,
    ) -> list[Image.Image]:
        """Edits of one image, or of several that the instruction refers to, as `Engine.edit` makes them."""
        (keys,) = noise_keys(seed, [0], n)
        more = {**noise_fields(seed, keys), **asked(options)}
        fields = {"model": self.name, "prompt": instruction, "n": str(n)}
        fields |= {name: value if isinstance(value, str) else json.dumps(value) for name, value in more.items()}
        body, kind = form(fields, [("image[]", to_png(entry)) for entry in image_list(image)])
        return self._pictures("/v1/images/edits", body, kind)

    def ask(self, image: AnyImage | Sequence[AnyImage] | None, question: str, *, max_new_tokens: int = 64) -> str:
        """The answer to a question about an image, several, or none."""
        images = [] if image is None else image_list(image)
        urls = [f"data:image/png;base64,{base64.b64encode(to_png(entry)).decode()}" for entry in images]
        content: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
        messages = [{"role": "user", "content": [*content, {"type": "text", "text": question}]}]
        body = {"model": self.name, "messages": messages, "max_tokens": max_new_tokens}
        return self._call("POST", "/v1/chat/completions", json.dumps(body).encode())["choices"][0]["message"]["content"]

    def _pictures(
        self,
        path: str,
        body: bytes,
        kind: str = "application/json",
        expansions: list[str] | None = None,
        abouts: list[dict[str, str]] | None = None,
    ) -> list[Image.Image]:
        rows = self._call("POST", path, body, kind)["data"]
        if expansions is not None:
            expansions += [row["revised_prompt"] for row in rows if "revised_prompt" in row]
        files = [base64.b64decode(row["b64_json"]) for row in rows]
        opened = [Image.open(io.BytesIO(file)) for file in files]
        if abouts is not None:
            for image in opened:
                image.load()
                abouts.append({str(name): value for name, value in image.info.items() if isinstance(value, str)})
        return [image.convert("RGB") for image in opened]

    def _call(self, method: str, path: str, body: bytes | None = None, kind: str = "application/json") -> Any:
        """What the server answers; its errors as UserErrors in its words."""
        make = http.client.HTTPSConnection if self._secure else http.client.HTTPConnection
        connection = make(self._place, timeout=SECONDS)
        headers = {"Content-Type": kind} | ({"Authorization": f"Bearer {self._key}"} if self._key else {})
        try:
            connection.request(method, self._path + path, body, headers)
            answer = connection.getresponse()
            status, data = answer.status, answer.read()
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "strerror", None) or type(error).__name__
            raise UserError(f"{self._place}: no answer from a server there ({reason})") from error
        finally:
            connection.close()
        try:
            values = json.loads(data)
        except ValueError:
            values = None
        if status == 200 and values is not None:
            return values
        words = values["error"]["message"] if isinstance(values, dict) and "error" in values else f"status {status}"
        raise UserError(f"{self._place}: {words}")


def connect(address: str, model: str | None = None, *, key: str | None = None) -> RemoteModel:
    """A model of a running server; see `RemoteModel`."""
    return RemoteModel(address, model, key)


def noise_fields(seed: int | Sequence[int], keys: Sequence[int]) -> dict[str, Any]:
    """The noise of a request's images as fields: a seed where one stands for all of them, else their keys."""
    for first in [seed] if isinstance(seed, int) else seed:
        if list(keys) == [key(first + place, 0, 0) for place in range(len(keys))]:
            return {"seed": first}
    return {"noise": list(keys)}


def asked(options: dict[str, Any]) -> dict[str, Any]:
    """Options of the engine as a request's fields."""
    settings = dict(options)
    scales = settings.pop("scales", None)
    if isinstance(settings.get("size"), tuple):
        settings["size"] = list(settings["size"])
    return ({"sampling": settings} if settings else {}) | ({} if scales is None else {"scales": scales})


def to_png(image: AnyImage) -> bytes:
    out = io.BytesIO()
    as_image(image).save(out, "PNG")
    return out.getvalue()


def form(fields: dict[str, str], files: Sequence[tuple[str, bytes]]) -> tuple[bytes, str]:
    """A multipart form and its content type."""
    mark = f"diptych{os.urandom(12).hex()}"
    pieces: list[bytes] = []
    for name, value in fields.items():
        pieces.append(f'--{mark}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'.encode())
    for place, (name, data) in enumerate(files):
        head = f'--{mark}\r\nContent-Disposition: form-data; name="{name}"; filename="{place}.png"\r\n'
        pieces.append(f"{head}Content-Type: image/png\r\n\r\n".encode() + data + b"\r\n")
    return b"".join(pieces) + f"--{mark}--\r\n".encode(), f"multipart/form-data; boundary={mark}"
