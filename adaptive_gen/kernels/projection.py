"""Norm and projections of a few tokens in Triton, each matrix being read once.

The matrices stay the model's own: a program takes some rows of one of up to three of them, so q, k
and v, or gate and up, are one launch without having been put side by side in memory.
"""

# Triton types the arguments of kernels as if they were called from kernels.
# pyright: reportMissingImports=false, reportArgumentType=false, reportCallIssue=false

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_OUT, BLOCK_HIDDEN = 32, 64


@triton.jit
def _rstd_kernel(x, out, eps, hidden: tl.constexpr, HIDDEN: tl.constexpr):
    """One over the root mean square of one row."""
    row, at = tl.program_id(0), tl.arange(0, HIDDEN)
    total = tl.zeros((HIDDEN,), tl.float32)
    for start in range(0, hidden, HIDDEN):
        part = tl.load(x + row * hidden + start + at, mask=start + at < hidden, other=0.0)
        part = part.to(tl.float32)
        total += part * part
    tl.store(out + row, 1.0 / tl.sqrt(tl.sum(total, 0) / hidden + eps))


@triton.jit
def normed_tile(x, gain, rstd, at_row, row_real, at, hidden: tl.constexpr):
    """Columns `at` of rows `at_row` of [tokens, hidden], normed and rounded where torch rounds."""
    real = at < hidden
    rows = tl.load(
        x + at_row[:, None] * hidden + at[None, :],
        mask=row_real[:, None] & real[None, :], other=0.0,
    )  # fmt: skip
    kind = rows.dtype
    factor = tl.load(gain + at, mask=real, other=0.0).to(tl.float32)
    rows = (rows.to(tl.float32) * rstd[:, None]).to(kind)
    return (rows.to(tl.float32) * factor[None, :]).to(kind)


@triton.jit
def _project_kernel(
    x, rstd, gain, w0, w1, w2, b0, b1, b2, out,
    tokens, hidden: tl.constexpr, n0, n1, n2, width,
    HAS_BIAS: tl.constexpr, GATED: tl.constexpr,
    TOKENS: tl.constexpr, OUT: tl.constexpr, HIDDEN: tl.constexpr,
):  # fmt: skip
    """OUT outputs of one of three matrices, or of both of a gated pair, for TOKENS tokens."""
    block = tl.program_id(0)
    blocks0, blocks1 = tl.cdiv(n0, OUT), tl.cdiv(n1, OUT)
    weight, bias, size, left = w0, b0, n0, n0 * 0
    if not GATED:
        if block >= blocks0 + blocks1:
            weight, bias, size, left = w2, b2, n2, n0 + n1
            block -= blocks0 + blocks1
        elif block >= blocks0:
            weight, bias, size, left = w1, b1, n1, n0
            block -= blocks0
    at_row, at_hidden = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS), tl.arange(0, HIDDEN)
    at_out = block * OUT + tl.arange(0, OUT)
    row_real, out_real = at_row < tokens, at_out < size
    scale = tl.load(rstd + at_row, mask=row_real, other=0.0)
    total = tl.zeros((TOKENS, OUT), tl.float32)
    other = tl.zeros((TOKENS, OUT), tl.float32)
    for start in range(0, hidden, HIDDEN):
        at = start + at_hidden
        real = at < hidden
        rows = normed_tile(x, gain, scale, at_row, row_real, at, hidden)
        place = at_out[:, None].to(tl.int64) * hidden + at[None, :]
        seen = out_real[:, None] & real[None, :]
        part = tl.load(weight + place, mask=seen, other=0.0)
        total = tl.dot(rows, tl.trans(part), total, input_precision="ieee")
        if GATED:
            part = tl.load(w1 + place, mask=seen, other=0.0)
            other = tl.dot(rows, tl.trans(part), other, input_precision="ieee")
    if GATED:
        # Each product is rounded as torch would write it down.
        gate = total.to(out.dtype.element_ty).to(tl.float32)
        gate = (gate / (1.0 + tl.exp(-gate))).to(out.dtype.element_ty)
        total = gate.to(tl.float32) * other.to(out.dtype.element_ty).to(tl.float32)
    if HAS_BIAS:
        total += tl.load(bias + at_out, mask=out_real, other=0.0).to(tl.float32)[None, :]
    place = at_row[:, None] * width + left + at_out[None, :]
    tl.store(
        out + place, total.to(out.dtype.element_ty), mask=row_real[:, None] & out_real[None, :]
    )


def at_least_16(tokens: int) -> int:
    """The rows of a product's tile: tensor cores multiply 16 at a time."""
    return max(16, 1 << (tokens - 1).bit_length())


def rstd_kernel(x: Tensor, eps: float) -> Tensor:
    """One over the root mean square of each row of [tokens, hidden], float32 [tokens]."""
    out = torch.empty(len(x), dtype=torch.float32, device=x.device)
    _rstd_kernel[(len(x),)](x, out, eps, x.shape[1], HIDDEN=1024)
    return out


def _launch(
    x: Tensor,
    gain: Tensor,
    eps: float,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    out: Tensor,
    gated: bool,
) -> Tensor:
    tokens, hidden = x.shape
    three = [*weights, *[weights[0]] * (3 - len(weights))]
    sizes = [len(w) for w in weights] + [0] * (3 - len(weights))
    rows = min(64, at_least_16(tokens))
    blocks = sum(triton.cdiv(n, BLOCK_OUT) for n in (sizes[:1] if gated else sizes))
    has_bias = biases[0] is not None
    given = [*biases, *[biases[0]] * (3 - len(weights))] if has_bias else [gain] * 3
    _project_kernel[(blocks, triton.cdiv(tokens, rows))](
        x, rstd_kernel(x, eps), gain, *three, *given, out,
        tokens, hidden, *sizes, out.shape[1],
        HAS_BIAS=has_bias, GATED=gated, TOKENS=rows, OUT=BLOCK_OUT, HIDDEN=BLOCK_HIDDEN,
    )  # fmt: skip
    return out


def project(
    x: Tensor,
    gain: Tensor,
    eps: float,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
) -> Tensor:
    """What `plain.project` does, for at most three matrices, all with a bias or none."""
    out = x.new_empty(len(x), sum(len(w) for w in weights))
    return _launch(x, gain, eps, weights, biases, out, gated=False)


def gated(x: Tensor, gain: Tensor, eps: float, gate: Tensor, up: Tensor) -> Tensor:
    """What `plain.gated` does."""
    out = x.new_empty(len(x), len(gate))
    return _launch(x, gain, eps, (gate, up), (None, None), out, gated=True)
