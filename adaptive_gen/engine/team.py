"""Threads that help with the products of compiled code; see `kernels.team` for how they share.

A helper is a Python thread that works and waits in one compiled function, without the interpreter's
lock. When nothing has been shared for some milliseconds it sleeps; the next call of a kernel wakes
it, which costs that call a few microseconds, and it joins in as soon as it is there.
"""

import atexit
import os
import threading
import time
from typing import Any

import numpy as np
import torch

from .machine_code import kernel

MOST_HELPERS = 15  # memory has nothing left for more
_AT_EXIT_S = 1.0


def threads() -> int:
    """How many threads a product may have: torch's number, unless `allow` said another."""
    return _allowed or torch.get_num_threads()


def allow(count: int) -> None:
    """Let products have `count` threads whatever torch has; 0: as many as torch."""
    global _allowed
    _allowed = count


def ready(most: int = MOST_HELPERS) -> Any:
    """Wake the helpers of this process; see `Team.ready`."""
    global _team
    if _team is None:
        with _making:
            if _team is None:
                _team = Team()
                atexit.register(_team.close)
                if hasattr(os, "register_at_fork"):
                    os.register_at_fork(after_in_child=_team.forget)
    return _team.ready(most)


def helpers(matrix_bytes: int) -> Any:
    """Who helps the kernels with matrices of up to so many bytes; what they take for `team`."""
    return ready(matrix_bytes // kernel("team").LEAST_BYTES - 1)


class Team:
    """The helpers of this process."""

    def __init__(self):
        """Nobody yet."""
        words = kernel("team")
        self._line, self._awake_at, self._helpers_at = words.LINE, words.AWAKE, words.HELPERS
        size = self._awake_at + self._line * MOST_HELPERS
        whole = np.zeros(size + self._line, np.int64)
        start = -(whole.ctypes.data // 8) % self._line  # words do not share a line of the cache
        self._words = whole[start : start + size]
        self._alone = np.zeros(size, np.int64)
        self._calls: list[threading.Event] = []  # one for each helper there is
        self._most = MOST_HELPERS  # fewer where the system has no more threads
        self._lock = threading.Lock()

    def ready(self, most: int) -> Any:
        """Wake as many helpers as `threads` says; returns what kernels take for `team`.

        Args:
            most: helpers that a product of the model is worth.
        """
        helpers = min(threads() - 1, self._most, most)
        if helpers < 1:
            return self._alone
        if len(self._calls) < helpers:
            self._hire(helpers)
            helpers = min(helpers, len(self._calls))
            if not helpers:
                return self._alone
        words = self._words
        words[self._helpers_at] = helpers
        for helper in range(helpers):
            if not words[self._awake_at + self._line * helper]:
                self._calls[helper].set()
        return words

    def _hire(self, helpers: int) -> None:
        with self._lock:
            if not self._calls:
                serve = kernel("helping").serve
                serve(self._alone, 0)  # compiles it, here where somebody says what takes so long
            while len(self._calls) < min(helpers, self._most):
                call, helper = threading.Event(), len(self._calls)
                name = f"adaptive_gen-helper-{helper + 1}"
                thread = threading.Thread(
                    target=self._live, args=(helper, call), name=name, daemon=True
                )
                try:
                    thread.start()
                except RuntimeError:  # the system, or an interpreter that ends, has no more
                    self._most = helper
                    return
                self._calls.append(call)

    def _live(self, helper: int, call: threading.Event) -> None:
        serve = kernel("helping").serve
        while True:
            call.wait()
            call.clear()
            self._words[self._awake_at + self._line * helper] = 1
            serve(self._words, helper)

    def dismiss(self) -> None:
        """Send all helpers to sleep, and wait for that."""
        self._words[self._helpers_at] = 0
        clock = time.monotonic()
        while self._words[self._awake_at :: self._line].any():
            time.sleep(0.001)
            if time.monotonic() - clock > _AT_EXIT_S:
                return

    def close(self) -> None:
        """Dismiss them for good: they must not spin on memory that is taken down."""
        self._most = 0
        self.dismiss()

    def forget(self) -> None:
        """Start without helpers: a forked process does not have its parent's threads."""
        self.__init__()


_allowed = 0
_making = threading.Lock()
_team: Team | None = None
