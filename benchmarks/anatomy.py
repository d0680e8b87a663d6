"""Where a token's time goes at full depth, and what is left above the floor.

The floor is reading every weight once at the speed of a large copy. Between it and the whole token
lie, one inside the other: the matrix products alone, the layers, and the loop around them. Beside
that, what it costs to catch up several pending tokens in one pass.
"""

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adaptive_gen.engine.cache import KVCache
from adaptive_gen.engine.compiled import CompiledSegment
from adaptive_gen.engine.fused import FusedSegment
from adaptive_gen.engine.matrices import product
from adaptive_gen.settings import state

from .micro import copy_bandwidth
from .shapes import decode_bytes

CONTEXT = 64  # tokens in the cache
PENDING = (1, 2, 4, 8, 16)
REPEATS = 8  # calls between two looks at the clock
NEW_TOKENS = 48


@torch.no_grad()
def run(model: Any, name: str, rounds: int) -> dict[str, Any]:
    """Take a token apart.

    Args:
        model: wrapped, on a CPU.
        name: for the table.
        rounds: repetitions in which the parts take turns; medians count.
    """
    wrapped = state(model)
    decoder, backend = wrapped.decoder, wrapped.backend
    (segment,) = backend.segments([decoder.n_layers])
    embed, readout = backend.embed(), backend.readout()
    ids = torch.randint(3, decoder.config.vocab_size, (1, CONTEXT + max(PENDING)))
    cache = KVCache(decoder.n_layers, capacity=2 * ids.shape[1])
    segment.run(embed(ids[:, :CONTEXT], (0,)), cache)
    blocks = {n: embed(ids[:, CONTEXT : CONTEXT + n], (CONTEXT,)).clone() for n in PENDING}

    def pass_of(block: Tensor) -> Callable[[], object]:
        def work() -> None:
            segment.run(block, cache, newest_only=True)
            cache.truncate(CONTEXT)

        return work

    parts: dict[str, Callable[[], object]] = {
        **{f"pending_{n}": pass_of(block) for n, block in blocks.items()},
        "readout": lambda: readout(blocks[1][0], decoder.n_layers),
    }
    if isinstance(segment, FusedSegment):
        parts["products"] = _products(segment)
    elif isinstance(segment, CompiledSegment):
        parts["products"] = _compiled_products(segment)
    taken: dict[str, list[float]] = {part: [] for part in (*parts, "token")}
    for _ in range(rounds + 1):  # the first warms up
        for part, work in parts.items():
            taken[part].append(_seconds(work))
        taken["token"].append(_token(model, ids[:, :CONTEXT]))
    us = {part: 1e6 * median(times[1:]) for part, times in taken.items()}
    bandwidth = copy_bandwidth("cpu")
    return {
        "model": name,
        "engine": backend.name,
        "n_layers": decoder.n_layers,
        "token_us": us["token"],
        "layers_us": us["pending_1"],
        "products_us": us.get("products"),
        "readout_us": us["readout"],
        "loop_us": us["token"] - us["pending_1"] - us["readout"],
        "floor_us": decode_bytes(model) / bandwidth / 1e3,
        "decode_bytes": decode_bytes(model),
        "copy_gb_per_s": bandwidth,
        "pending_over_one": {n: us[f"pending_{n}"] / us["pending_1"] for n in PENDING},
    }


def _seconds(work: Callable[[], object]) -> float:
    clock = time.perf_counter()
    for _ in range(REPEATS):
        work()
    return (time.perf_counter() - clock) / REPEATS


def _token(model: Any, prompt: Tensor) -> float:
    """Seconds of a token in a whole generation at full depth, its prompt aside."""
    out = model.generate(
        prompt,
        adaptive=True,
        threshold=1.0,
        max_new_tokens=NEW_TOKENS,
        eos_token_id=None,
        return_dict_in_generate=True,
    )
    return out.report.decode_s / (NEW_TOKENS - 1)


def _compiled_products(segment: CompiledSegment) -> Callable[[], object]:
    """The same by the kernels of `compiled`."""
    from adaptive_gen.engine import team
    from adaptive_gen.kernels import products

    weights, scales = segment.model.weights, segment.model.scales
    dtype = segment.desk.x.dtype
    buffers = [
        (np.ones((1, w.shape[2]), dtype), np.zeros((1, w.shape[1] * w.shape[3]), dtype))
        for w in weights
    ]

    def run() -> None:
        helpers = team.ready()
        for layer in range(segment.start, segment.stop):
            for (x, y), matrix, scale in zip(buffers, weights, scales, strict=True):
                products.add_product(x, matrix[layer], scale[layer], y, 1, helpers)

    return run


def _products(segment: FusedSegment) -> Callable[[], object]:
    """The matrix products of one token, in the order in which the layers need them."""
    layers, sizes = segment.model.layers, segment.model.sizes
    wide = torch.randn(1, max(sizes.hidden, sizes.intermediate, sizes.heads * sizes.head_dim))
    hidden, mixed = wide[:, : sizes.hidden], wide[:, : sizes.heads * sizes.head_dim]
    inner = wide[:, : sizes.intermediate]

    def work() -> None:
        for layer in layers:
            product(hidden, layer.qkv)
            product(mixed, layer.out)
            product(hidden, layer.gate_up)
            product(inner, layer.down)

    return work
