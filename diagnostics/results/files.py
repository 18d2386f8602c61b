"""Files that are there as a whole or not at all: written beside their place, then renamed to it."""

from __future__ import annotations

import errno
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A new file in the folder of ``path`` to write to, which takes the place of ``path`` when the block ends.

    An error or an interruption inside the block leaves what was there before, and nothing beside it. A symbolic link
    stays one: its target is replaced. The file has the permissions of the one that it replaces. What is no regular
    file, such as ``/dev/stdout``, cannot be replaced and is written to itself.

    Args:
        path: Where the file is to be. The one to write to has the same suffix.

    Raises:
        OSError: ``path`` is a folder or may not be written to, or its folder is missing or may not be.
    """
    place = Path(os.path.realpath(path))
    mode = _mode(place)
    if mode is not None and not stat.S_ISREG(mode):
        yield place
        return
    unfinished = _beside(place)
    try:
        yield unfinished
        with unfinished.open("r+b") as file:
            os.fsync(file.fileno())  # or a crash of the machine could leave an empty file under the name
        if mode is not None:
            unfinished.chmod(stat.S_IMODE(mode))
        unfinished.replace(place)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file in UTF-8, as a whole or not at all; see :func:`replacing`."""
    with replacing(path) as file:
        file.write_text(text, encoding="utf-8")


def check_writable(path: str | os.PathLike[str]) -> None:
    """Raise the OSError that :func:`replacing` would raise, before there is anything to write."""
    place = Path(os.path.realpath(path))
    mode = _mode(place)
    if mode is None or stat.S_ISREG(mode):
        _beside(place).unlink()


def _mode(place: Path) -> int | None:
    """The mode of what is there, None where there is nothing; refuses what may not be written to."""
    if not place.exists():
        return None
    if place.is_dir():
        raise _error(errno.EISDIR, place)
    if not os.access(place, os.W_OK):  # replacing it would take no permission but that of its folder
        raise _error(errno.EACCES, place)
    return place.stat().st_mode


def _beside(place: Path) -> Path:
    """An empty file in the same folder, with the permissions of any new file."""
    name = place.with_name(f".{place.stem[:100]}-{secrets.token_hex(4)}{place.suffix}")
    try:
        os.close(os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    except OSError as error:
        raise _error(error.errno or errno.EIO, place) from None
    return name


def _error(number: int, place: Path) -> OSError:
    return OSError(number, os.strerror(number), os.fspath(place))  # of the subclass that the number says
