"""Threads that help with the products of compiled code; see `kernels.team` for how they share.

A helper is a Python thread that spends its life in one compiled function, without the interpreter's
lock. When nothing has been shared for a millisecond it sleeps; the next call of a kernel wakes it,
which costs that call a few microseconds, and it joins in as soon as it is there.
"""

import atexit
import os
import threading
import time
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch

from . import compiled

MOST_HELPERS = 63
_AT_EXIT_S = 1.0


def threads() -> int:
    """How many threads a product may have: torch's number, unless `allow` said another."""
    return _allowed or torch.get_num_threads()


def allow(count: int) -> None:
    """Let products have `count` threads whatever torch has; 0: as many as torch."""
    global _allowed
    _allowed = count


class Team:
    """The helpers of this process."""

    def __init__(self):
        """Nobody yet."""
        words = compiled.kernel("team")
        self._line, self._awake, self._wanted = words.LINE, words.AWAKE, words.HELPERS
        size = self._awake + self._line * MOST_HELPERS
        whole = np.zeros(size + self._line, np.int64)
        start = -(whole.ctypes.data // 8) % self._line  # words do not share a line of the cache
        self._whole, self._words = whole, whole[start : start + size]
        self._alone = np.zeros(size, np.int64)
        self._calls: list[SimpleQueue[None]] = []
        self._lock = threading.Lock()

    def ready(self) -> Any:
        """Wake as many helpers as `threads` says; returns what kernels take for `team`."""
        helpers = min(threads() - 1, MOST_HELPERS)
        if helpers < 1:
            return self._alone
        words = self._words
        words[self._wanted] = helpers
        for helper in range(helpers):
            if not words[self._awake + self._line * helper]:
                self._wake(helper)
        return words

    def _wake(self, helper: int) -> None:
        with self._lock:
            at = self._awake + self._line * helper
            if self._words[at]:
                return
            if not self._calls:
                serve = compiled.kernel("products").serve
                serve(self._alone, 0)  # compiles it, here where somebody says what takes so long
            while len(self._calls) <= helper:
                self._calls.append(SimpleQueue())
                name = f"adaptive_gen-helper-{len(self._calls)}"
                arguments = (len(self._calls) - 1, self._calls[-1])
                threading.Thread(target=self._live, args=arguments, name=name, daemon=True).start()
            self._words[at] = 1
            self._calls[helper].put(None)

    def _live(self, helper: int, calls: "SimpleQueue[None]") -> None:
        serve = compiled.kernel("products").serve
        while True:
            calls.get()
            serve(self._words, helper)

    def dismiss(self) -> None:
        """Send all helpers to sleep, and wait for that."""
        self._words[self._wanted] = 0
        clock = time.monotonic()
        while self._words[self._awake :: self._line].any():
            time.sleep(0.001)
            if time.monotonic() - clock > _AT_EXIT_S:
                return

    def forget(self) -> None:
        """Start without helpers: a forked process does not have its parent's threads."""
        self.__init__()


_allowed = 0
_team: Team | None = None


def ready() -> Any:
    """Wake the helpers of this process; see `Team.ready`."""
    global _team
    if _team is None:
        _team = Team()
        atexit.register(_team.dismiss)  # they must not spin on memory that is taken down
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=_team.forget)
    return _team.ready()
