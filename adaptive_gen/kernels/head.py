"""The LM head in Triton: final norm, product and summary in one pass over the vocabulary.

Every program reads some rows of the head once and keeps a running summary of them; a second, small
kernel brings the summaries together. No softmax over the vocabulary, no sorting, and no logits in
between unless they are wanted.
"""

# What triton's functions return inside a kernel is not what they say.
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false

# Triton types the arguments of kernels as if they were called from kernels.
# pyright: reportMissingImports=false, reportArgumentType=false, reportCallIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from .plain import SUMMARY
from .projection import at_least_16, normed_tile, rstd_kernel

BLOCK_VOCAB, BLOCK_HIDDEN = 64, 64


@triton.jit
def _partial_kernel(
    x, rstd, gain, head, logits, partial,
    tokens, vocab, hidden: tl.constexpr,
    STORE: tl.constexpr, TOKENS: tl.constexpr, VOCAB: tl.constexpr, HIDDEN: tl.constexpr,
):  # fmt: skip
    """Logits of VOCAB tokens of the vocabulary and what sums them up, for all rows."""
    block, blocks = tl.program_id(0), tl.num_programs(0)
    at_row, at_hidden = tl.arange(0, TOKENS), tl.arange(0, HIDDEN)
    ids = block * VOCAB + tl.arange(0, VOCAB)
    row_real, id_real = at_row < tokens, ids < vocab
    scale = tl.load(rstd + at_row, mask=row_real, other=0.0)
    score = tl.zeros((TOKENS, VOCAB), tl.float32)
    for start in range(0, hidden, HIDDEN):
        at = start + at_hidden
        real = at < hidden
        rows = normed_tile(x, gain, scale, at_row, row_real, at, hidden)
        weight = tl.load(
            head + ids[:, None].to(tl.int64) * hidden + at[None, :],
            mask=id_real[:, None] & real[None, :], other=0.0,
        )  # fmt: skip
        score = tl.dot(rows, tl.trans(weight), score, input_precision="ieee")
    # Rounded to the model's precision first, as logits that are written down are.
    score = score.to(head.dtype.element_ty)
    if STORE:
        tl.store(
            logits + at_row[:, None] * vocab + ids[None, :], score,
            mask=row_real[:, None] & id_real[None, :],
        )  # fmt: skip
    score = tl.where(id_real[None, :], score.to(tl.float32), float("-inf"))
    top = tl.max(score, 1)
    token = tl.min(tl.where(score == top[:, None], ids[None, :], vocab), 1)
    second = tl.max(tl.where(ids[None, :] == token[:, None], float("-inf"), score), 1)
    weight_of = tl.exp(score - top[:, None])
    mass = tl.sum(weight_of, 1)
    moment = tl.sum(weight_of * tl.where(id_real[None, :], score - top[:, None], 0.0), 1)
    out = partial + (at_row * blocks + block) * 5
    tl.store(out, top, mask=row_real)
    tl.store(out + 1, second, mask=row_real)
    tl.store(out + 2, token.to(tl.float32), mask=row_real)
    tl.store(out + 3, mass, mask=row_real)
    tl.store(out + 4, moment, mask=row_real)


@triton.jit
def _reduce_kernel(partial, summary, blocks, BLOCKS: tl.constexpr):
    """Bring the partial summaries of one row together."""
    row, at = tl.program_id(0), tl.arange(0, BLOCKS)
    part = partial + (row * blocks + at) * 5
    real = at < blocks
    tops = tl.load(part, mask=real, other=float("-inf"))
    seconds = tl.load(part + 1, mask=real, other=float("-inf"))
    tokens = tl.load(part + 2, mask=real, other=float("inf"))
    masses = tl.load(part + 3, mask=real, other=0.0)
    moments = tl.load(part + 4, mask=real, other=0.0)
    top = tl.max(tops, 0)
    token = tl.min(tl.where(tops == top, tokens, float("inf")), 0)
    best = (tops == top) & (tokens == token)
    second = tl.max(tl.where(best, seconds, tops), 0)
    scale = tl.exp(tops - top)
    mass = tl.sum(masses * scale, 0)
    # Sum of exp(l - top) * (l - top), from sums around each block's own top.
    shift = tl.where(real, tops - top, 0.0)
    moment = tl.sum(tl.where(real, (moments + masses * shift) * scale, 0.0), 0)
    out = summary + row * 5
    tl.store(out, top)
    tl.store(out + 1, second)
    tl.store(out + 2, token)
    tl.store(out + 3, top + tl.log(mass))
    tl.store(out + 4, tl.log(mass) - moment / mass)


def read_out(
    hidden: Tensor,
    gain: Tensor,
    eps: float,
    head: Tensor,
    logits: Tensor | None,
    summary: Tensor,
) -> None:
    """What `plain.read_out` does; without `logits` none are written."""
    tokens, size = hidden.shape
    vocab = head.shape[0]
    blocks = triton.cdiv(vocab, BLOCK_VOCAB)
    rstd = rstd_kernel(hidden, eps)
    partial = torch.empty(tokens, blocks, SUMMARY, dtype=torch.float32, device=hidden.device)
    _partial_kernel[(blocks,)](
        hidden, rstd, gain, head, summary if logits is None else logits, partial,
        tokens, vocab, size,
        STORE=logits is not None, TOKENS=at_least_16(tokens), VOCAB=BLOCK_VOCAB,
        HIDDEN=BLOCK_HIDDEN,
    )  # fmt: skip
    _reduce_kernel[(tokens,)](partial, summary, blocks, BLOCKS=triton.next_power_of_2(blocks))
