"""Errors of the API: one form, with the status that clients of OpenAI's API understand."""

from __future__ import annotations

from typing import Any

from diptych.core.errors import UserError
from diptych.serving.scheduler import Closing, QueueFull

TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "invalid_request_error",
    405: "invalid_request_error",
    408: "timeout_error",
    410: "invalid_request_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    431: "invalid_request_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
    504: "timeout_error",
}


LONGEST_MESSAGE, LONGEST_PARAM = 1000, 100
"""Characters of an error that is answered; a request may hold names and values of any length."""


class ApiError(Exception):
    """A request that is refused or that failed. param: the field that is to blame. code: for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = headers or {}

    def body(self) -> dict[str, Any]:
        """As it is answered."""
        kind = TYPES.get(self.status, "server_error")
        param = None if self.param is None else shortened(self.param, LONGEST_PARAM)
        message = shortened(self.message, LONGEST_MESSAGE)
        return {"error": {"message": message, "type": kind, "param": param, "code": self.code}}


def shortened(text: str, longest: int) -> str:
    """A text of at most so many characters, which UTF-8 can write."""
    text = text.encode("utf-8", "replace").decode("utf-8")
    return text if len(text) <= longest else f"{text[: longest - 3]}..."


def bad(param: str, message: str, code: str = "invalid_value") -> ApiError:
    """A field with a wrong value."""
    return ApiError(400, f"{param}: {message}", param=param, code=code)


def as_api_error(error: BaseException, request_id: str) -> ApiError:
    """Whatever went wrong, as it is answered; what is no fault of the request tells nothing of its insides."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, UserError):
        return ApiError(400, str(error), code="invalid_value")
    if isinstance(error, RecursionError):
        return ApiError(400, "the request is nested too deeply", code="invalid_json")
    if isinstance(error, QueueFull):
        wait = {"Retry-After": str(error.wait)}
        return ApiError(429, str(error), code="queue_full", headers=wait)
    if isinstance(error, Closing):
        return ApiError(503, "the server is being shut down", code="shutting_down", headers={"Retry-After": "10"})
    words = f"{type(error).__name__} {error}".lower()
    if isinstance(error, MemoryError) or "out of memory" in words:
        return ApiError(503, "not enough memory for this request; ask for smaller or fewer images", code="memory")
    return ApiError(500, f"the server failed at request {request_id}; its log says more", code="internal_error")
