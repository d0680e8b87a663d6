"""CUDA graphs without CUDA: what a step did is taped once and played back.

As with a captured graph, playing back repeats the same operations on the same addresses: whatever
the step read from Python stays as it was when it was taped, and nothing may be read back to the
host. A step that leans on either gives wrong results on this tape, as it would on a GPU.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# What waits for the device or has a shape that depends on values.
UNCAPTURABLE = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "is_nonzero"}


class Tape(TorchDispatchMode):
    """Tapes every operation that runs inside."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in UNCAPTURABLE, f"{name} cannot be captured"
        out = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, out))
        return out

    def play(self):
        """Do the same again, into the same memory."""
        for func, args, kwargs, out in self.operations:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class Taped:
    """A recorder for the back end `static`."""

    def __init__(self):
        self.seconds, self.tapes = 0.0, 0

    def record(self, step):
        for _ in range(2):  # as capturing warms up
            step()
        tape = Tape()
        with torch.no_grad(), tape:
            step()
        self.seconds += 1.0
        self.tapes += 1
        return tape.play
