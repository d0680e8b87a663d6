"""Attention of a few tokens per row to that row's keys, in Triton.

A row's keys are divided among `SPLITS` programs per head of keys, so that one long text keeps a
GPU busy; each leaves an unfinished softmax, and a second kernel brings them together. All lengths
are read on the device. Rows without tokens in the block, and rows that are flagged, cost a look.
"""

# What triton's functions return inside a kernel is not what they say.
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false

# Triton types the arguments of kernels as if they were called from kernels.
# pyright: reportMissingImports=false, reportArgumentType=false, reportCallIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from .plan import Plan

BLOCK_KEYS, SPLITS = 64, 8


@triton.jit
def _split_kernel(
    query, keys, values, firsts, counts, starts, skip, partial, lse,
    scale, window, of_slot, of_head,
    HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, WIDE: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, SPLITS: tl.constexpr,
    WINDOWED: tl.constexpr, SKIPS: tl.constexpr,
):  # fmt: skip
    """ROWS queries (tokens x heads that share keys) of a slot against its share of the keys."""
    slot, kv_head = tl.program_id(0), tl.program_id(1) // SPLITS
    split, block = tl.program_id(1) % SPLITS, tl.program_id(2)
    count = tl.load(counts + slot)
    if SKIPS:
        if tl.load(skip + slot) != 0:
            count = count * 0
    if block * ROWS < count * GROUP:
        first, start = tl.load(firsts + slot), tl.load(starts + slot)
        at = block * ROWS + tl.arange(0, ROWS)
        token, member = at // GROUP, at % GROUP
        real, dim = token < count, tl.arange(0, WIDE)
        dim_real = dim < DIM
        row = (first + token) * HEADS + kv_head * GROUP + member
        q = tl.load(
            query + row[:, None] * DIM + dim[None, :],
            mask=real[:, None] & dim_real[None, :], other=0.0,
        )  # fmt: skip
        # The keys that some query of this block sees, a share of them to each split.
        last = start + tl.minimum(count, (block * ROWS + ROWS - 1) // GROUP + 1)
        begin = start * 0
        if WINDOWED:
            begin = tl.maximum(start + block * ROWS // GROUP - window + 1, 0) // KEYS * KEYS
        share = tl.cdiv(tl.cdiv(last - begin, KEYS), SPLITS) * KEYS
        begin += split * share
        position = start + token
        top = tl.full((ROWS,), float("-inf"), tl.float32)
        mass = tl.zeros((ROWS,), tl.float32)
        mixed = tl.zeros((ROWS, WIDE), tl.float32)
        base = slot.to(tl.int64) * of_slot + kv_head * of_head
        for at_key in range(begin, tl.minimum(begin + share, last), KEYS):
            key_at = at_key + tl.arange(0, KEYS)
            place = base + key_at[:, None] * DIM + dim[None, :]
            inside = (key_at < last)[:, None] & dim_real[None, :]
            k = tl.load(keys + place, mask=inside, other=0.0)
            v = tl.load(values + place, mask=inside, other=0.0)
            score = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
            seen = key_at[None, :] <= position[:, None]
            if WINDOWED:
                seen = seen & (key_at[None, :] > position[:, None] - window)
            score = tl.where(seen, score, float("-inf"))
            new_top = tl.maximum(top, tl.max(score, 1))
            # A query that has seen nothing so far has no largest score to subtract.
            safe = tl.where(new_top == float("-inf"), 0.0, new_top)
            weight = tl.exp(score - safe[:, None])
            fade = tl.exp(top - safe)
            mass = mass * fade + tl.sum(weight, 1)
            mixed = tl.dot(weight.to(v.dtype), v, mixed * fade[:, None], input_precision="ieee")
            top = new_top
        some = mass > 0
        mixed = mixed / tl.where(some, mass, 1.0)[:, None]
        out = row * SPLITS + split
        tl.store(
            partial + out[:, None] * DIM + dim[None, :], mixed,
            mask=real[:, None] & dim_real[None, :],
        )  # fmt: skip
        tl.store(lse + out, tl.where(some, top + tl.log(tl.where(some, mass, 1.0)), float("-inf")),
                 mask=real)  # fmt: skip


@triton.jit
def _join_kernel(partial, lse, out, DIM: tl.constexpr, WIDE: tl.constexpr, SPLITS: tl.constexpr):
    """Bring the splits of one head of one token together; what no split wrote stays zero."""
    row, at = tl.program_id(0), tl.arange(0, SPLITS)
    dim = tl.arange(0, WIDE)
    total = tl.load(lse + row * SPLITS + at)
    top = tl.max(total, 0)
    weight = tl.exp(total - tl.where(top == float("-inf"), 0.0, top))
    place = (row * SPLITS + at)[:, None] * DIM + dim[None, :]
    # A split without a key left nothing worth reading.
    wanted = (weight > 0)[:, None] & (dim < DIM)[None, :]
    parts = tl.load(partial + place, mask=wanted, other=0.0)
    mass = tl.sum(weight, 0)
    mixed = tl.sum(parts * weight[:, None], 0) / tl.where(mass > 0, mass, 1.0)
    tl.store(out + row * DIM + dim, mixed.to(out.dtype.element_ty), mask=dim < DIM)


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    plan: Plan,
    scale: float,
    window: int | None,
    skip: Tensor | None = None,
) -> Tensor:
    """What `plain.attend` does; zeros for tokens that fill the block up and for skipped rows.

    Args:
        query: [tokens, heads, head_dim].
        keys: [slots, kv_heads, capacity, head_dim], this block's included.
        values: the same shape.
        plan: where the tokens stand.
        scale: of the scores.
        window: positions a token sees, its own included; None is all.
        skip: [slots]; rows whose flag is not 0 are left out.
    """
    tokens, heads, dim = query.shape
    slots, kv_heads = keys.shape[:2]
    group = heads // kv_heads
    rows = min(64, max(16, triton.next_power_of_2(tokens * group)))
    partial = torch.empty(tokens * heads * SPLITS, dim, dtype=torch.float32, device=query.device)
    lse = torch.full((tokens * heads * SPLITS,), float("-inf"), device=query.device)
    out = query.new_empty(tokens, heads * dim)
    wide = max(16, triton.next_power_of_2(dim))
    assert keys.stride(2) == dim and keys.stride() == values.stride()
    _split_kernel[(slots, kv_heads * SPLITS, triton.cdiv(tokens * group, rows))](
        query, keys, values, plan.firsts, plan.counts, plan.starts,
        plan.counts if skip is None else skip, partial, lse,
        scale, window or 0, keys.stride(0), keys.stride(1),
        HEADS=heads, GROUP=group, DIM=dim, WIDE=wide, ROWS=rows, KEYS=BLOCK_KEYS, SPLITS=SPLITS,
        WINDOWED=window is not None, SKIPS=skip is not None,
    )  # fmt: skip
    _join_kernel[(tokens * heads,)](partial, lse, out, DIM=dim, WIDE=wide, SPLITS=SPLITS)
    return out
