"""What the hardware gives: bandwidth, skinny matrix products, graph nodes, the host's round trip.

The numbers that the engine's design rests on; none of them runs the engine. A part that fails
leaves its reason in place of its figures.
"""

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

from .conditional import if_node_us
from .shapes import BY_NAME

ROWS = (1, 4, 16, 64)
SHAPES = ("Llama-3.2-1B", "Llama-2-13B")
NODES = 100


def run(device: str) -> dict[str, Any]:
    """All of them; those that need a GPU are left out on a CPU."""
    parts: dict[str, Callable[[], Any]] = {
        "copy_gb_per_s": lambda: copy_bandwidth(device),
        "matrix_products": lambda: _matrix_products(device),
    }
    if device == "cuda":
        parts |= {
            "graph_node_us": _graph_node_us,
            "if_node_us": lambda: if_node_us(seconds),
            "host_round_trip_us": _host_round_trips_us,
        }
    found: dict[str, Any] = {}
    for name, part in parts.items():
        try:
            found[name] = part()
        except Exception as error:
            found[name] = {"failed": f"{type(error).__name__}: {error}"}
    return found


def seconds(work: Callable[[], Any], device: str, calls: int = 20) -> float:
    """Median seconds of one call, the device's own clock on a GPU."""
    for _ in range(3):
        work()
    if device == "cpu":
        found = []
        for _ in range(calls):
            clock = time.perf_counter()
            work()
            found.append(time.perf_counter() - clock)
        return median(found)
    events = [[torch.cuda.Event(enable_timing=True) for _ in "ab"] for _ in range(calls)]
    for start, end in events:
        start.record()
        work()
        end.record()
    torch.cuda.synchronize()
    return median(start.elapsed_time(end) for start, end in events) / 1e3


def copy_bandwidth(device: str) -> float:
    """Bytes read and written per second by a large copy, in GB/s."""
    size = 2**31 if device == "cuda" else 2**27
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / seconds(lambda: target.copy_(source), device, 5) / 1e9


def _matrix_products(device: str) -> list[dict[str, Any]]:
    """Few rows through the matrices of true shapes: seconds and the bandwidth they reach."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    found = []
    for name in SHAPES if device == "cuda" else ("16x256", "24x512"):
        shape = BY_NAME[name]
        queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        matrices = {
            "qkv": (queries + 2 * keys, shape.hidden),
            "o": (shape.hidden, queries),
            "gate_up": (2 * shape.intermediate, shape.hidden),
            "down": (shape.hidden, shape.intermediate),
            "head": (shape.vocab, shape.hidden),
        }
        for part, (wide, deep) in matrices.items():
            # Several copies in turn: one that stays in the cache would not be read from memory.
            copies = max(2, min(64, int(4e8 // (wide * deep * dtype.itemsize))))
            weights = torch.randn(copies, wide, deep, dtype=dtype, device=device)
            for rows in ROWS:
                x = torch.randn(rows, deep, dtype=dtype, device=device)
                took = _one_after_another(x, weights, device) / copies
                found.append(
                    {
                        "model": name,
                        "matrix": part,
                        "rows": rows,
                        "us": took * 1e6,
                        "gb_per_s": weights[0].nbytes / took / 1e9,
                    }
                )
    return found


def _one_after_another(x: torch.Tensor, weights: torch.Tensor, device: str) -> float:
    """Seconds of `x` times every matrix; as one graph on a GPU, or launching would be timed."""

    def work() -> None:
        for weight in weights:
            torch.nn.functional.linear(x, weight)

    return seconds(_captured(work).replay if device == "cuda" else work, device, 5)


def _captured(work: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        work()  # what is set up on first use must not be captured
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph


def _graph_node_us() -> float:
    """What one more node of a captured graph costs where its kernel does next to nothing."""
    x = torch.zeros(1, device="cuda")

    def chain() -> None:
        for _ in range(NODES):
            x.add_(1)

    return seconds(_captured(chain).replay, "cuda") / NODES * 1e6


def _host_round_trips_us() -> dict[str, float]:
    """From launching a graph that computes a flag to the host knowing it, three ways."""
    counter = torch.zeros(1, dtype=torch.int32, device="cuda")
    pinned = torch.zeros(1, dtype=torch.int32, pin_memory=True)
    seen = pinned.numpy()  # reads the same memory without a torch call

    def count() -> None:
        counter.add_(1)

    def count_and_tell() -> None:
        counter.add_(1)
        pinned.copy_(counter, non_blocking=True)

    alone, telling = _captured(count), _captured(count_and_tell)
    torch.cuda.synchronize()

    def item() -> None:
        alone.replay()
        counter.item()

    def synchronise() -> None:
        telling.replay()
        torch.cuda.current_stream().synchronize()

    def spin() -> None:
        before = seen[0]
        telling.replay()
        deadline = time.perf_counter() + 1.0
        while seen[0] == before and time.perf_counter() < deadline:
            pass

    # The host waits inside every call, so its clock is the right one.
    return {
        "item": seconds(item, "cpu", 200) * 1e6,
        "pinned_synchronise": seconds(synchronise, "cpu", 200) * 1e6,
        "pinned_spin": seconds(spin, "cpu", 200) * 1e6,
    }
