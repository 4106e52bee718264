"""Pictures from addresses, where the server was started with hosts that are allowed."""

from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
import urllib.parse
from collections.abc import Sequence

from diptych.serving.errors import ApiError, bad

MOST_BYTES = 32 << 20
SECONDS = 15.0


def fetch_picture(url: str, hosts: Sequence[str], where: str) -> bytes:
    """The bytes at an address of an allowed host.

    The host's address is looked up once, must be a public one, and is the one that is connected to; redirects are not
    followed.
    """
    try:
        parts = urllib.parse.urlsplit(url)
        port = parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError:
        raise bad(where, "the address cannot be read", "invalid_image_url") from None
    host = (parts.hostname or "").lower()
    if host not in [allowed.lower() for allowed in hosts] or parts.username or parts.password:
        raise bad(where, f"pictures are fetched from {', '.join(hosts)} alone", "invalid_image_url")
    address = public_address(host, port, where)
    connection: http.client.HTTPConnection
    try:
        plain = socket.create_connection((address, port), SECONDS)
        connection = http.client.HTTPConnection(host, port, timeout=SECONDS)
        secure = parts.scheme == "https"
        connection.sock = ssl.create_default_context().wrap_socket(plain, server_hostname=host) if secure else plain
        path = urllib.parse.urlunsplit(("", "", parts.path or "/", parts.query, ""))
        connection.request("GET", path, headers={"Accept": "image/*"})
        answer = connection.getresponse()
        data = answer.read(MOST_BYTES + 1) if answer.status == 200 else b""
        connection.close()
    except (OSError, http.client.HTTPException):
        raise bad(where, "the picture cannot be fetched", "invalid_image_url") from None
    if answer.status != 200:
        raise bad(where, f"the picture cannot be fetched (status {answer.status})", "invalid_image_url")
    if len(data) > MOST_BYTES:
        raise bad(where, f"the picture has more than {MOST_BYTES:,} bytes", "image_too_large")
    return data


def public_address(host: str, port: int, where: str) -> str:
    """The address of a host; refused where any of its addresses is not public."""
    try:
        found = {str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)}
    except OSError:
        raise bad(where, "the host of the picture is not known", "invalid_image_url") from None
    if not all(ipaddress.ip_address(address.partition("%")[0]).is_global for address in found):
        raise ApiError(400, f"{where}: the host has a private address", param=where, code="invalid_image_url")
    return sorted(found)[0]
