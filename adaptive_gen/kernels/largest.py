"""The largest of some numbers, without sorting the others."""

from typing import Any

from .jit import inner


@inner
def _sink(heap: Any, size: int, at: int, numbers: Any, largest: bool) -> None:
    """Let an index sink to its place among the first `size` of a heap.

    Args:
        heap: indices, each before the two below it: by the larger number, or the smaller.
        size: how many of them are in the heap.
        at: where the index is that may be out of place.
        numbers: what indices are of.
        largest: whether the largest number comes first.
    """
    while 2 * at + 1 < size:
        below = 2 * at + 1
        if below + 1 < size:
            one, other = numbers[heap[below]], numbers[heap[below + 1]]
            if (other > one) if largest else (other < one):
                below += 1
        upper, lower = numbers[heap[at]], numbers[heap[below]]
        if not ((lower > upper) if largest else (lower < upper)):
            return
        heap[at], heap[below] = heap[below], heap[at]
        at = below


@inner
def heaped(heap: Any, size: int, numbers: Any, largest: bool) -> None:
    """Make a heap of its first `size` indices; see `_sink`."""
    for at in range(size // 2 - 1, -1, -1):
        _sink(heap, size, at, numbers, largest)


@inner
def drop_first(heap: Any, size: int, numbers: Any) -> None:
    """Put the largest of a heap's first `size` indices behind the others."""
    heap[0], heap[size - 1] = heap[size - 1], heap[0]
    _sink(heap, size - 1, 0, numbers, True)


@inner
def kth_largest(k: int, numbers: Any, heap: Any) -> Any:
    """The k-th largest of at least k numbers; `heap` [k or more] is for indices."""
    for n in range(k):
        heap[n] = n
    heaped(heap, k, numbers, False)
    least = numbers[heap[0]]
    for n in range(k, len(numbers)):
        if numbers[n] > least:
            heap[0] = n
            _sink(heap, k, 0, numbers, False)
            least = numbers[heap[0]]
    return least
