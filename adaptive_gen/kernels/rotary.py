"""Norms and rotation of queries and keys, and the K/V write, in one Triton kernel."""

# Triton types the arguments of kernels as if they were called from kernels.
# pyright: reportMissingImports=false, reportArgumentType=false, reportCallIssue=false

import triton
import triton.language as tl
from torch import Tensor

from .plan import Heads, Plan


@triton.jit
def _times(a, b):
    """A product rounded to the precision of `a`, as torch writes it down."""
    return (a.to(tl.float32) * b.to(tl.float32)).to(a.dtype)


@triton.jit
def _write_kernel(
    projected, query, q_gain, k_gain, cos, sin, slots, positions, keys, values,
    eps, width, of_slot, of_head,
    QUERY: tl.constexpr, KV: tl.constexpr, DIM: tl.constexpr, HALF: tl.constexpr,
    NORMED: tl.constexpr,
):  # fmt: skip
    """One head of one token: queries first, then keys, then values."""
    token, head = tl.program_id(0), tl.program_id(1)
    at = tl.arange(0, HALF)
    real = at < DIM // 2
    source = projected + token * width + head * DIM + at
    low = tl.load(source, mask=real, other=0.0)
    high = tl.load(source + DIM // 2, mask=real, other=0.0)
    slot, position = tl.load(slots + token), tl.load(positions + token)
    kind = low.dtype
    if head < QUERY + KV:
        if NORMED:
            wide_low, wide_high = low.to(tl.float32), high.to(tl.float32)
            mean = (tl.sum(wide_low * wide_low, 0) + tl.sum(wide_high * wide_high, 0)) / DIM
            rstd = 1.0 / tl.sqrt(mean + eps)
            gain = k_gain + at
            if head < QUERY:
                gain = q_gain + at
            low = _times((wide_low * rstd).to(kind), tl.load(gain, mask=real, other=0.0))
            high = _times(
                (wide_high * rstd).to(kind), tl.load(gain + DIM // 2, mask=real, other=0.0)
            )
        row = position * DIM + at
        cos_low = tl.load(cos + row, mask=real, other=0.0)
        cos_high = tl.load(cos + row + DIM // 2, mask=real, other=0.0)
        sin_low = tl.load(sin + row, mask=real, other=0.0)
        sin_high = tl.load(sin + row + DIM // 2, mask=real, other=0.0)
        turned_low = _times(low, cos_low).to(tl.float32) - _times(high, sin_low).to(tl.float32)
        turned_high = _times(high, cos_high).to(tl.float32) + _times(low, sin_high).to(tl.float32)
        low, high = turned_low.to(kind), turned_high.to(kind)
    if head < QUERY:
        target = query + (token * QUERY + head) * DIM + at
    else:
        place = slot * of_slot + (head - QUERY) % KV * of_head + position * DIM + at
        target = keys + place
        if head >= QUERY + KV:
            target = values + place
    tl.store(target, low, mask=real)
    tl.store(target + DIM // 2, high, mask=real)


def write(
    projected: Tensor,
    heads: Heads,
    gains: tuple[Tensor, Tensor, float] | None,
    table: tuple[Tensor, Tensor],
    plan: Plan,
    keys: Tensor,
    values: Tensor,
) -> Tensor:
    """What `plain.write` does; K/V buffers may be slices of larger ones, their rows whole."""
    tokens, width = projected.shape
    query = projected.new_empty(tokens, heads.query, heads.dim)
    q_gain, k_gain, eps = gains or (table[0], table[0], 0.0)
    assert keys.stride(2) == heads.dim and keys.stride() == values.stride()
    _write_kernel[(tokens, heads.query + 2 * heads.kv)](
        projected, query, q_gain, k_gain, *table, plan.slots, plan.positions, keys, values,
        eps, width, keys.stride(0), keys.stride(1),
        QUERY=heads.query, KV=heads.kv, DIM=heads.dim,
        HALF=triton.next_power_of_2(heads.dim // 2), NORMED=gains is not None,
    )  # fmt: skip
    return query
