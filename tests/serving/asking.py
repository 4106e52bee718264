"""Requests to a served model, and what comes back."""

from __future__ import annotations

import base64
import http.client
import io
import json
from typing import Any

import numpy as np
from PIL import Image

from serving_process import Running

PROMPT = "a red circle left of a blue square"
HEAD = b"POST /v1/images/generations HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
Client = Any


def picture_of(row: Any) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(row.b64_json)))


def levels(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB")).astype(int)


def png(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def data_url(image: Image.Image) -> str:
    return "data:image/png;base64," + base64.b64encode(png(image)).decode()


def post(
    server: Running, path: str, body: bytes, kind: str = "application/json", **headers: str
) -> tuple[int, Any, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection.request("POST", path, body, {"Content-Type": kind, **headers})
    answer = connection.getresponse()
    data = answer.read()
    connection.close()
    return answer.status, answer.headers, json.loads(data) if data else None


def get(server: Running, path: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection.request("GET", path)
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer.status, text


def metric(server: Running, name: str) -> float:
    lines = [line for line in get(server, "/metrics")[1].splitlines() if line.startswith(f"{name} ")]
    return float(lines[0].split()[-1]) if lines else 0.0
