"""Pictures from addresses, where the server was started with hosts that are allowed."""

from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
import time
import urllib.parse
from collections.abc import Sequence

from diptych.serving.errors import ApiError, bad

MOST_BYTES = 32 << 20
SECONDS = 15.0
"""That a picture may take in all, however slowly its host sends it."""
PIECE = 1 << 16
NAT64 = ipaddress.ip_network("64:ff9b::/96")


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
    if host not in [allowed.lower().strip("[]") for allowed in hosts] or parts.username or parts.password:
        raise bad(where, f"pictures are fetched from {', '.join(hosts)} alone", "invalid_image_url")
    path = urllib.parse.urlunsplit(("", "", parts.path or "/", parts.query, ""))
    if not path.isascii() or not path.isprintable() or " " in path:
        raise bad(where, "the address must be of ASCII characters without spaces; escape others", "invalid_image_url")
    # The address that was checked is the one that is connected to.
    end = time.monotonic() + SECONDS
    address = public_address(host, port, where)
    connection = http.client.HTTPConnection(host, port)
    status, data = 0, b""
    try:
        line = connection.sock = connected(address, port, host if parts.scheme == "https" else None)
        connection.request("GET", path, headers={"Accept": "image/*"})
        # So many bytes, and so many seconds, whatever the other side sends.
        with connection.getresponse() as answer:
            status = answer.status
            while status == 200 and len(data) <= MOST_BYTES:
                left = end - time.monotonic()
                if left <= 0:
                    raise TimeoutError
                line.settimeout(left)
                piece = answer.read1(PIECE)
                if not piece:
                    break
                data += piece
    except TimeoutError:
        raise bad(where, f"the picture did not arrive within {SECONDS:g} s", "invalid_image_url") from None
    except (OSError, http.client.HTTPException):
        raise bad(where, "the picture cannot be fetched", "invalid_image_url") from None
    finally:
        connection.close()
    if status != 200:
        raise bad(where, f"the picture cannot be fetched (status {status})", "invalid_image_url")
    if len(data) > MOST_BYTES:
        raise bad(where, f"the picture has more than {MOST_BYTES:,} bytes", "image_too_large")
    return data


def connected(address: str, port: int, secure: str | None) -> socket.socket:
    """A connection to an address. secure: the name that its certificate must have; None for one without TLS."""
    plain = socket.create_connection((address, port), SECONDS)
    return plain if secure is None else ssl.create_default_context().wrap_socket(plain, server_hostname=secure)


def public_address(host: str, port: int, where: str) -> str:
    """The address of a host; refused where any of its addresses is not public."""
    try:
        addresses = {str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)}
    except (OSError, UnicodeError):
        raise bad(where, "the host of the picture is not known", "invalid_image_url") from None
    if not all(map(is_public, addresses)):
        raise ApiError(400, f"{where}: the host has a private address", param=where, code="invalid_image_url")
    return sorted(addresses)[0]


def is_public(text: str) -> bool:
    """Whether an address is reached over the public network, also where it wraps one of IPv4."""
    address = ipaddress.ip_address(text.partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address):
        inside = address.ipv4_mapped or address.sixtofour or (address.teredo[1] if address.teredo else None)
        if address in NAT64:
            inside = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if inside is not None:
            return is_public(str(inside))
    return address.is_global and not address.is_multicast
