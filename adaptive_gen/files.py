"""Directories and files: finding models, making directories, writing files whole or not at all."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import OutputError


def is_nowhere(name: str) -> bool:
    """Whether a model's name is neither a directory here nor could be one on the hub."""
    of_the_hub = name.count("/") == 1 and not name.startswith((".", "/", "~"))
    return not name or not (of_the_hub or Path(name).is_dir())


def make_directory(path: Path, option: str) -> None:
    """Make a directory with those above it; it may be there already.

    Args:
        path: its name.
        option: the command-line option that names another place, for the error.

    Raises:
        OutputError: it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"cannot make {path}: {error.strerror}. Name another directory with {option}."
        ) from None


@contextmanager
def whole(path: Path, option: str, mode: str = "w") -> Iterator[Any]:
    """A file to write that takes its name only when all of it is written.

    Args:
        path: its name; what lies there is replaced.
        option: the command-line option that names another place, for the error.
        mode: "w" or "wb".

    Raises:
        OutputError: it cannot be written; nothing is left behind.
    """
    part = None
    try:
        with tempfile.NamedTemporaryFile(
            mode, dir=path.parent, prefix=".", suffix=".part", delete=False
        ) as file:
            part = Path(file.name)
            yield file
        os.chmod(part, 0o644)
        os.replace(part, path)
    except BaseException as error:
        if part is not None:
            part.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OutputError(
                f"cannot write {path}: {error.strerror}. Make room there, or name a directory you "
                f"may write to with {option}."
            ) from None
        raise
