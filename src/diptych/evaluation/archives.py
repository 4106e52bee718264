"""Archives of benchmarks, unpacked by the checked names of their members."""

from __future__ import annotations

import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from diptych.core.errors import UserError
from diptych.core.filenames import member_path
from diptych.core.files import write_folder


def unpack(archive: Path, folder: Path, place: Callable[[PurePosixPath], PurePosixPath | None]) -> None:
    """The files of a tar archive into a new folder, whole or not at all.

    Only regular files are written, without rights, owners or links of the archive.

    Args:
        place: where a member goes, relative to the folder; None leaves it out.

    Raises:
        UserError: the archive cannot be read, or names a file outside the folder or the same file twice.
    """

    def write(temporary: Path) -> None:
        with tarfile.open(archive) as tar:
            for member in tar:
                wanted = place(member_path(member.name, str(archive))) if member.isfile() else None
                content = None if wanted is None else tar.extractfile(member)
                if wanted is None or content is None:
                    continue
                target = temporary.joinpath(member_path(str(wanted), str(archive)))
                target.parent.mkdir(parents=True, exist_ok=True)
                if target.exists():
                    raise UserError(f"{archive}: holds {member.name!r} twice")
                with content, target.open("xb") as file:
                    shutil.copyfileobj(content, file)

    try:
        write_folder(folder, write)
    except (tarfile.TarError, EOFError) as error:
        raise UserError(f"{archive}: not a readable archive ({error})") from error


def below(name: str) -> Callable[[PurePosixPath], PurePosixPath | None]:
    """A `place` for `unpack`: what lies in a folder `name` at any depth of the archive, relative to that folder."""

    def place(path: PurePosixPath) -> PurePosixPath | None:
        folders = path.parts[:-1]
        return PurePosixPath(*path.parts[folders.index(name) + 1 :]) if name in folders else None

    return place
