"""Where an exported checkpoint goes: what may be replaced there, and what says what it is."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from .errors import OutputError

EXPORTED = "adaptive_gen_export.json"  # lies in exported checkpoints and lists their files


def check_free(out: Path, force: bool) -> None:
    """Raise `OutputError` unless nothing would be lost that an export can make again."""
    if not out.exists() and not out.is_symlink():
        return
    if out.is_symlink() or not out.is_dir():
        raise OutputError(f"{out} is no directory; name one that does not exist.")
    found = {file.relative_to(out).as_posix() for file in out.rglob("*") if not file.is_dir()}
    if not found or (force and "config.json" in found):
        return
    if force:
        raise OutputError(
            f"{out} holds files and no checkpoint: nothing of that is replaced. Name another "
            "directory."
        )
    try:
        written = dict(json.loads((out / EXPORTED).read_text(encoding="utf-8"))["files"])
    except (OSError, ValueError, KeyError, TypeError):
        raise OutputError(
            f"{out} is not empty and no earlier export. Name another directory, or replace the "
            "checkpoint in it with --force (force=True)."
        ) from None
    if added := sorted(found - {*written, EXPORTED}):
        raise OutputError(
            f"{out} holds {added[0]}, which no export wrote. Move it away, or replace all of "
            "the directory with --force (force=True)."
        )
    changed = (name for name in sorted(found & {*written}) if _digest(out / name) != written[name])
    if (name := next(changed, None)) is not None:
        raise OutputError(
            f"{out} holds {name}, which was changed after it was exported. Move it away, or "
            "replace all of the directory with --force (force=True)."
        )


def mark(made: Path, what: dict[str, Any]) -> None:
    """Say what this is and which files belong to it; the next export may replace just these."""
    names = sorted(f.relative_to(made).as_posix() for f in made.rglob("*") if f.is_file())
    for name in names:
        (made / name).chmod(0o644)  # safetensors writes for its owner alone
    document = {**what, "files": {name: _digest(made / name) for name in names}}
    (made / EXPORTED).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def move(made: Path, out: Path) -> None:
    """Put the finished checkpoint in its place; an earlier one goes when the new one stands."""
    earlier = made.with_name("earlier")
    if out.exists():
        os.rename(out, earlier)
    try:
        os.rename(made, out)
    except BaseException:
        if earlier.exists():
            os.rename(earlier, out)
        raise
