"""What becomes of a step: captured once in a CUDA graph and replayed, or simply called.

A step is a function without arguments over buffers at fixed addresses. Whether it is captured must
make no difference to it, which is why the tests can run it on a CPU.
"""

import time
from collections.abc import Callable
from typing import Any, Protocol

import torch

Step = Callable[[], None]
_WARM_UPS = 2  # what libraries set up and kernels compile on first use must not be captured


class Recorder(Protocol):
    """Turns a step into something to call whenever it is to run."""

    seconds: float  # spent on recording so far

    def record(self, step: Step) -> Step:
        """Record a step; it may run while that is done, so it must bear repeating."""
        ...


class Direct:
    """Records nothing: the step itself is called."""

    seconds = 0.0

    def record(self, step: Step) -> Step:
        """Give the step back."""
        return step


class Captured:
    """Captures CUDA graphs that share one pool for what they compute on the way."""

    def __init__(self, device: torch.device):
        """Capture on `device`."""
        self.seconds = 0.0
        self._device = device
        self._pool: Any = None

    def record(self, step: Step) -> Step:
        """Run the step for warm-up, then capture it.

        Raises:
            RuntimeError: it does what cannot be captured, or memory runs out.
        """
        clock = time.perf_counter()
        with torch.cuda.device(self._device):
            current, aside = torch.cuda.current_stream(), torch.cuda.Stream()
            aside.wait_stream(current)
            with torch.cuda.stream(aside):
                for _ in range(_WARM_UPS):
                    step()
            current.wait_stream(aside)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            # Other threads may go on using the device meanwhile.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                step()
            self._pool = self._pool or graph.pool()
            torch.cuda.synchronize()
        self.seconds += time.perf_counter() - clock
        return graph.replay
