"""A server on its port: from the models' names to the last request."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from types import FrameType
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from diptych.core.errors import UserError
from diptych.serving.adapters import Adapters
from diptych.serving.app import Mount, Status, make_app
from diptych.serving.cache import AnswerCache
from diptych.serving.errors import ApiError
from diptych.serving.memory import free
from diptych.serving.metrics import Metrics
from diptych.serving.models import Models
from diptych.serving.scheduler import Bounds, Scheduler
from diptych.serving.service import Options, Service
from diptych.serving.tools import tools_mount

log = logging.getLogger(__name__)
LAST_SECONDS = 30
"""That running requests have at shutdown."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a server is started. rows: images and texts that run at a time. memory: bytes that they may take,
    None for half of what is free once the models are loaded. more: what makes further applications of the server, such
    as the page."""

    models: Sequence[str]
    host: str = "127.0.0.1"
    port: int = 8000
    device: str = "auto"
    keep: int = 2
    rows: int = 32
    memory: int | None = None
    queue: int = 256
    batching: bool = True
    tools: bool = True
    options: Options = field(default_factory=Options)
    adapters: Adapters = field(default_factory=Adapters)
    more: Sequence[Callable[[Service], Mount]] = ()


class Protocol(H11Protocol):
    """HTTP/1.1 that also ends connections which never send a request."""

    seconds = 30.0

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._first = self.loop.call_later(self.seconds, self._idle)

    def connection_lost(self, exc: Exception | None) -> None:
        self._first.cancel()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """What is not HTTP is answered in the form of all errors."""
        refused = ApiError(400, "this is no HTTP request that can be read", code="invalid_http")
        body = json.dumps(refused.body()).encode()
        headers = [("content-type", "application/json"), ("content-length", str(len(body))), ("connection", "close")]
        for event in (h11.Response(status_code=400, headers=headers), h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _idle(self) -> None:
        if self.cycle is None and not self.transport.is_closing():
            self.transport.close()


class Server(uvicorn.Server):
    """uvicorn's, which refuses requests that wait once it is told to stop, and lets those that run end."""

    def __init__(self, config: uvicorn.Config, status: Status, scheduler: Scheduler, mounts: Sequence[Mount]) -> None:
        super().__init__(config)
        self._status, self._scheduler, self._mounts = status, scheduler, mounts

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._status.closing = True
        self._scheduler.refuse()
        for mount in self._mounts:
            if mount.stop is not None:
                mount.stop()
        super().handle_exit(sig, frame)


def serve(settings: Settings) -> None:
    """Serve until the process is told to stop.

    Raises:
        UserError: a port that is taken, or a model that cannot be read.
    """
    listener = bound(settings.host, settings.port)
    # The engine computes in a thread beside the answers; these wait for it no longer than this.
    sys.setswitchinterval(0.001)
    metrics = Metrics()
    scheduler = Scheduler(Bounds(rows=settings.rows, queue=settings.queue, batching=settings.batching), metrics)
    models = Models(
        settings.models, keep=settings.keep, device=settings.device, dropped=scheduler.forget,
        adapters=settings.adapters,
    )  # fmt: skip
    options = settings.options
    service = Service(models, scheduler, metrics, options, AnswerCache(options.cache))
    status = Status()
    try:
        asyncio.run(run(settings, service, status, listener))
    finally:
        scheduler.close()
        listener.close()


async def run(settings: Settings, service: Service, status: Status, listener: socket.socket) -> None:
    """Load the first models, measure what fits, and serve."""
    memory = settings.memory
    for name in settings.models[: settings.keep]:
        async with service.models.use(name) as engine:
            if settings.memory is None:
                memory = free(engine) // 2
        for adapter in service.models.adapters.of(name):  # what does not fit is said before anything is served
            async with service.models.use(f"{name}:{adapter}"):
                pass
    service.scheduler.bounds = replace(service.scheduler.bounds, memory=memory)
    made = mounts(settings, service)
    app = make_app(service, status, made)
    Protocol.seconds = settings.options.reading
    config = uvicorn.Config(
        app, http=Protocol, ws="none", log_config=None, access_log=False, timeout_keep_alive=30,
        timeout_graceful_shutdown=LAST_SECONDS, server_header=False, h11_max_incomplete_event_size=1 << 16,
    )  # fmt: skip
    status.ready = True
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    print(f"serving {', '.join(settings.models)} at http://{shown}:{port}", flush=True)  # noqa: T201 - the command's word
    await Server(config, status, service.scheduler, made).serve(sockets=[listener])


def mounts(settings: Settings, service: Service) -> list[Mount]:
    """The tools, where they are wanted, and what else is."""
    tools = [tools_mount(service, settings.host)] if settings.tools else []
    return [*tools, *(make(service) for make in settings.more)]


def bound(host: str, port: int) -> socket.socket:
    """A listening socket; UserError where the address cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except (OSError, OverflowError) as error:
        listener.close()
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"--host {host} --port {port}: cannot listen there ({reason})") from error
    listener.listen(512)
    return listener
