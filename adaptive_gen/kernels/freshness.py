"""Machine code on disk is forgotten when any of the kernels' sources has changed.

numba keeps what it compiles beside each source and looks at that file alone. A kernel also contains
those it calls, from other files, and an update may leave the caller's file as it was.
"""

import hashlib
from pathlib import Path

_FOLDER = Path(__file__).parent
_COMPILED_TOO = tuple(_FOLDER.parent / "engine" / name for name in ("drafts.py", "thrift.py"))
_STAMP = "kernels.sha256"


def forget_stale(sources: list[Path] | None = None) -> None:
    """Remove the machine code of other sources than these; None: those of the kernels."""
    sources = sources or sorted([*_FOLDER.glob("*.py"), *_COMPILED_TOO])
    whole = hashlib.sha256()
    for source in sources:
        whole.update(source.read_bytes())
    for folder in {source.parent / "__pycache__" for source in sources}:
        stamp = folder / _STAMP
        try:
            if stamp.is_file() and stamp.read_text() == whole.hexdigest():
                continue
            for index in folder.glob("*.nbi"):
                index.unlink(missing_ok=True)
            folder.mkdir(exist_ok=True)
            stamp.write_text(whole.hexdigest())
        except OSError:  # a folder that cannot be written has no such machine code either
            continue
