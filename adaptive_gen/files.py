"""Writing files whole or not at all."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import OutputError

EXPORTED = "adaptive_gen_export.json"  # lies in exported checkpoints and lists their files


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
