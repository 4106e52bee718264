"""Serve models over HTTP: OpenAI's API for images and chat, a web page, and tools for agents.

The server listens on this machine alone unless --host says otherwise. A key is best given by the environment variable
DIPTYCH_API_KEY. Ctrl-C lets running requests end, for 30 seconds at most.

    diptych serve toy/iomm toy/ovis-u1
    curl http://127.0.0.1:8000/v1/models

The page is at the server's address itself.
"""

from __future__ import annotations

import argparse
import re
import sys

KEY = "DIPTYCH_API_KEY"
LONGEST = 10**6
"""Of options that are counts or seconds, and megabytes of a request."""


def add(parser: argparse.ArgumentParser) -> None:
    from diptych.cli.options import MODEL

    parser.add_argument("models", metavar="MODEL", nargs="+", help=MODEL)
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps; the best there is when not given")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (127.0.0.1, this machine alone)")
    parser.add_argument("--port", type=int, default=8000, help="port, 0 for a free one (8000)")
    parser.add_argument("--api-key", metavar="KEY", help=f"that requests must bring (else the variable {KEY})")
    parser.add_argument("--keep", type=int, default=2, help="models that are loaded at a time (2)")
    parser.add_argument("--rows", type=int, default=32, help="images and texts that run at a time (32)")
    parser.add_argument("--memory", type=float, metavar="MB", help="that they may take (half of what is free at start)")
    parser.add_argument("--queue", type=int, default=256, help="requests that may wait (256)")
    parser.add_argument(
        "--adapter", metavar="NAME=PATH[:SCALE],...", action="append", default=[],
        help="LoRA that requests choose as MODEL:NAME, of the first model; MODEL:NAME=PATH for another",
    )  # fmt: skip
    parser.add_argument("--adapters", metavar="FOLDER", help="from which requests with the key may load further LoRA")
    parser.add_argument("--no-batching", action="store_true", help="run requests one after the other")
    parser.add_argument("--no-cache", action="store_true", help="make exact repeats anew")
    parser.add_argument("--no-page", action="store_true", help="leave out the web page")
    parser.add_argument("--runs", metavar="FOLDER", default="runs", help="whose runs the page shows (runs)")
    parser.add_argument("--no-tools", action="store_true", help="leave out the tools for agents (MCP)")
    parser.add_argument("--timeout", type=float, default=600, metavar="SECONDS", help="of a request (600)")
    parser.add_argument("--read-timeout", type=float, default=30, metavar="SECONDS", help="of its arrival (30)")
    parser.add_argument("--max-body", type=int, default=64, metavar="MB", help="of a request (64)")
    parser.add_argument(
        "--allow-urls", metavar="HOST", action="append", default=[], help="fetch pictures of chats from this host"
    )
    parser.add_argument("--cors", metavar="ORIGIN", action="append", default=[], help="pages that may call the server")


def run(args: argparse.Namespace) -> int:
    import ipaddress
    import os
    from collections.abc import Callable
    from pathlib import Path

    from diptych.cli import options
    from diptych.core.errors import UserError
    from diptych.core.web import checked_key

    for name in ("keep", "rows", "memory", "timeout", "read_timeout", "max_body"):
        value = getattr(args, name)
        if value is not None and not value > 0:
            raise UserError(f"--{name.replace('_', '-')} must be above 0, not {value:g}")
        if value is not None and value > LONGEST:
            raise UserError(f"--{name.replace('_', '-')} must be at most {LONGEST}, not {value:g}")
    if args.queue < 0:
        raise UserError(f"--queue must not be negative, not {args.queue}")
    if not 0 <= args.port <= 65535:
        raise UserError(f"--port must be from 0 to 65535, not {args.port}")
    if not args.host.strip():
        raise UserError("--host is empty; 127.0.0.1 is this machine alone")
    for name in args.models:
        if not name.strip():
            raise UserError("a MODEL has an empty name")
        if args.models.count(name) > 1:
            raise UserError(f"{name}: given twice")
    for origin in args.cors:
        if origin != "*" and not re.fullmatch(r"https?://[^/\s]+", origin):
            raise UserError(f"--cors {origin}: an origin is written as https://host, or * for all")
    for host in args.allow_urls:
        if not re.fullmatch(r"[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]", host):
            raise UserError(f"--allow-urls {host}: the name of a host, without address or port")
    key = checked_key(args.api_key or os.environ.get(KEY, ""), "--api-key" if args.api_key else KEY)
    folder = None if args.adapters is None else Path(args.adapters).expanduser()
    if folder is not None and not folder.is_dir():
        raise UserError(f"--adapters {args.adapters}: is no folder")
    if folder is not None and not key:
        raise UserError(f"--adapters goes with a key, which those who load an adapter must bring; set {KEY}")
    device, runs = options.device(args.device), Path(args.runs).expanduser().resolve()
    try:
        import python_multipart  # noqa: F401  # pyright: ignore[reportUnusedImport] - as Starlette wants it

        from diptych.serving.adapters import Adapters, read_adapters
        from diptych.serving.app import Mount
        from diptych.serving.server import Settings, serve
        from diptych.serving.service import Options, Service

        adapters = Adapters(read_adapters(args.adapter, args.models), folder)
        more: list[Callable[[Service], Mount]] = []
        if not args.no_page:
            from diptych.page.mount import page_mount

            more.append(lambda service: page_mount(service, runs))
    except ModuleNotFoundError as error:
        raise UserError(f"serving needs {error.name}; install diptych[serve]") from error
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    try:
        local = ipaddress.ip_address(args.host).is_loopback
    except ValueError:
        local = args.host == "localhost"
    if not local and not key:
        print(
            f"diptych: warning: {args.host} can be reached from other machines, and no key is asked for; set {KEY}",
            file=sys.stderr,
        )
    serve(
        Settings(
            models=args.models,
            host=args.host,
            port=args.port,
            device=device,
            keep=args.keep,
            rows=args.rows,
            memory=None if args.memory is None else int(args.memory * 1e6),
            queue=args.queue,
            batching=not args.no_batching,
            tools=not args.no_tools,
            more=more,
            adapters=adapters,
            options=Options(
                timeout=args.timeout,
                body=args.max_body << 20,
                reading=args.read_timeout,
                cache=0 if args.no_cache else Options.cache,
                urls=tuple(args.allow_urls),
                key=key,
                cors=tuple(args.cors),
                local=local,
                verbose=args.verbose >= 2,
            ),
        )
    )
    return 0
