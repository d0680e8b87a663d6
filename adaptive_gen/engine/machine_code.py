"""The compiled kernels from outside: loading them, and telling somebody who waits for them."""

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from importlib import import_module
from typing import Any

PATIENCE_S = 3.0  # what a first run of compiled code may take before somebody is told why

log = logging.getLogger("adaptive_gen")


@contextmanager
def compiling() -> Iterator[None]:
    """Say what takes so long, should this installation run code of this kind for the first time."""
    told = threading.Timer(
        PATIENCE_S,
        log.warning,
        [
            "compiling decoding kernels for this CPU: up to a minute, once per installation and "
            "kind of kernel."
        ],
    )
    told.daemon = True
    told.start()
    try:
        yield
    finally:
        told.cancel()


@lru_cache
def kernel(name: str) -> Any:
    """A module of `kernels`; only a process that decodes on a CPU has to load numba for one."""
    return import_module(f"..kernels.{name}", __package__)
