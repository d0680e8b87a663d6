"""Machine code on disk counts only for the sources it was made from, all of them.

numba keeps what it compiles and looks at the source of that one function's file. A kernel also
contains those it calls, from other files, and an update may leave the caller's file as it was.
"""

import hashlib
from pathlib import Path
from typing import Any

from numba.core.caching import IndexDataCacheFile, NullCache

_FOLDER = Path(__file__).parent
_COMPILED_TOO = tuple(
    _FOLDER.parent / "engine" / name for name in ("drafts.py", "promise.py", "thrift.py")
)


def digest(sources: list[Path]) -> str:
    """Of the contents of files."""
    whole = hashlib.sha256()
    for source in sources:
        whole.update(source.read_bytes())
    return whole.hexdigest()


# As this process has imported them: a later change on disk is not what it compiles.
SOURCES = digest(sorted([*_FOLDER.glob("*.py"), *_COMPILED_TOO]))


class CodeFiles(IndexDataCacheFile):
    """Machine code on disk that several processes may write at once.

    numba numbers the files, and names one in the index before it is written: meanwhile another
    process finds there what was compiled from older sources, or for other types.
    """

    def save(self, key: Any, data: Any) -> None:
        """Keep code under a name of its own, and then tell the index."""
        own = hashlib.sha256(self._dump((self._source_stamp, key))).hexdigest()[:32]
        name = f"{self._index_name.removesuffix('.nbi')}.{own}.nbc"
        self._save_data(name, data)
        self._save_index({**self._load_index(), key: name})


def stamped(function: Any, sources: str = SOURCES) -> Any:
    """A function that numba compiles, and keeps for these sources only.

    Where numba no longer works this way, nothing is kept: slow, but never wrong.
    """
    try:
        kept = function._cache._cache_file
        for needed in ("_dump", "_load_index", "_save_index", "_save_data"):
            getattr(CodeFiles, needed)
        base, stamp = kept._index_name.removesuffix(".nbi"), (kept._source_stamp, sources)
        function._cache._cache_file = CodeFiles(kept._cache_path, base, stamp)
    except AttributeError:
        function._cache = NullCache()
    return function
