"""Names that come from outside (archives, benchmark tables, recipes) as names of files inside one folder."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from pathlib import PurePosixPath

from diptych.core.errors import UserError

LONGEST = 160
"""Bytes of a file's name; file systems allow 255, and suffixes and hidden partial files need room."""
_UNSAFE = re.compile(r"[^\w .,+=@()\[\]{}!#$%&'~^;-]")
_RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)


def file_name(name: str) -> str:
    """`name` as the name of one file: it never leaves its folder, is never hidden, and is valid on every system.

    An ordinary name stays as it is. Of any other name the unsafe characters (separators, control and formatting
    characters, a leading dot, lone surrogates) become "_", and eight digits of the name's SHA-256 are added before the
    suffix, so that two different names are never one file.
    """
    safe = _UNSAFE.sub("_", unicodedata.normalize("NFC", name)).rstrip(" .").lstrip(" ")
    safe = "_" + safe.lstrip(".") if safe.startswith(".") else safe
    if name and safe == name and not _RESERVED.fullmatch(name) and len(name.encode()) <= LONGEST:
        return name
    stem, dot, suffix = safe.rpartition(".")
    if not dot or not 0 < len(suffix) <= 8:
        stem, suffix = safe, ""
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    cut = stem.encode()[: LONGEST - 20].decode("utf-8", "ignore").strip(" .")
    return f"{cut or '_'}-{digest}" + (f".{suffix}" if suffix else "")


def relative_name(path: str) -> str:
    """A relative path with "/" between its parts, each of them passed through `file_name`."""
    return "/".join(file_name(part) for part in path.split("/"))


def member_path(name: str, where: str) -> PurePosixPath:
    """The path of a member of an archive or of an entry in a table, relative to the folder it belongs in.

    Args:
        where: what names it, for the error.

    Raises:
        UserError: the path is absolute, climbs out of the folder, or holds a backslash, a colon or a control character.
    """
    path = PurePosixPath(name)
    unsafe = any(letter in '\\:"<>|?*' or ord(letter) < 32 or 0xD800 <= ord(letter) <= 0xDFFF for letter in name)
    if not path.parts or path.is_absolute() or ".." in path.parts or unsafe:
        raise UserError(f"{where}: the name {name!r} leads outside its folder or is no file name")
    return path
