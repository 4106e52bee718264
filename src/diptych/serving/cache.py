"""Answers to exact repeats of requests, as many as a bound of memory holds."""

from __future__ import annotations

import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any


class AnswerCache:
    """Answers by their requests, the least recently used forgotten first. limit: bytes of all, 0 for none."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.size = 0
        self._lock = threading.Lock()
        self._kept: OrderedDict[str, tuple[Any, int]] = OrderedDict()

    def get(self, key: str | None) -> Any:
        """The answer, or None."""
        if key is None or not self.limit:
            return None
        with self._lock:
            if key not in self._kept:
                return None
            self._kept.move_to_end(key)
            return self._kept[key][0]

    def put(self, key: str | None, answer: Any, size: int) -> None:
        """Keep an answer of so many bytes."""
        if key is None or size > self.limit:
            return
        with self._lock:
            if key in self._kept:
                self.size -= self._kept.pop(key)[1]
            self._kept[key] = (answer, size)
            self.size += size
            while self.size > self.limit:
                _, (_, gone) = self._kept.popitem(last=False)
                self.size -= gone


def fingerprint(endpoint: str, fields: Mapping[str, Any], pictures: list[bytes]) -> str:
    """What tells requests apart: all their fields and the bytes of their pictures."""
    digest = hashlib.sha256(json.dumps([endpoint, fields], sort_keys=True, default=str).encode())
    for picture in pictures:
        digest.update(hashlib.sha256(picture).digest())
    return digest.hexdigest()
