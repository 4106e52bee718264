"""Where pictures go, and what they carry: written whole or not at all, never over another file in silence."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diptych.core.errors import UserError
from diptych.core.files import write_file

if TYPE_CHECKING:
    from PIL import Image

PICTURES = (".png", ".jpg", ".jpeg", ".webp")


def destinations(out: str | None, stems: Sequence[str], n: int) -> list[Path]:
    """Where n pictures for each of `stems` go: a file for one, else files named after them in a folder."""
    path = Path(out or ".").expanduser()
    if path.suffix.lower() in PICTURES:
        if n * len(stems) > 1:
            raise UserError(f"-o {out}: one file, but {n * len(stems)} images are asked for; give a folder")
        files = [path]
    elif path.suffix and not path.is_dir():
        raise UserError(f"-o {out}: pictures are written as {', '.join(PICTURES)}, or into a folder")
    else:
        endings = [".png"] if n == 1 else [f"-{number}.png" for number in range(1, n + 1)]
        files = [path / f"{stem}{ending}" for stem in stems for ending in endings]
    folder = files[0].parent
    if folder.exists() and not folder.is_dir():
        raise UserError(f"-o {out}: {folder} is a file, not a folder")
    return files


def by_scale(files: Sequence[Path], names: Sequence[str]) -> list[Path]:
    """The files of each image at every scale: the scale's name is added where there are several."""
    if len(names) <= 1:
        return list(files)
    return [file.with_name(f"{file.stem}-{name}{file.suffix}") for file in files for name in names]


def refuse_existing(files: Sequence[Path], overwrite: bool) -> None:
    """UserError for a file that would be written over, before anything is drawn."""
    there = [file for file in files if file.exists()]
    if there and not overwrite:
        more = f" and {len(there) - 1} more" if len(there) > 1 else ""
        raise UserError(f"{there[0]}{more}: exists already; give another -o, or --overwrite")


def save_picture(image: Image.Image, file: Path, about: dict[str, str]) -> None:
    """Write a picture and print its name; PNG files carry how they were made."""
    from diptych.inference.provenance import png_info

    options: dict[str, Any] = {"pnginfo": png_info(about)} if file.suffix.lower() == ".png" else {"quality": 95}
    write_file(file, lambda temporary: image.save(temporary, **options))
    print(file)


def made_before(file: Path, about: dict[str, str]) -> bool:
    """Whether a file is the picture that would be made now, by what it carries.

    Raises:
        UserError: another picture lies there.
    """
    from PIL import Image

    from diptych.data.imaging import UNREADABLE

    if not file.exists():
        return False
    try:
        with Image.open(file) as image:
            carried = {name: image.info.get(name) for name in about if name not in ("software", "expansion")}
    except UNREADABLE as error:
        raise UserError(f"{file}: exists already and is no picture; give another -o, or --overwrite") from error
    if carried != {name: about[name] for name in carried}:
        raise UserError(f"{file}: exists already and was made otherwise; give another -o, or --overwrite")
    return True
