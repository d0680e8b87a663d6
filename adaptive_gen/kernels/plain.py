"""Every operation in torch: what runs without Triton, and what its kernels are tested against.

Nothing here reads a value back to the host or has a shape that depends on one, so all of it can be
captured in a CUDA graph. Norms work in float32 and round as transformers' do.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .plan import Heads, Plan

TOP, SECOND, TOKEN, LOGSUMEXP, ENTROPY = range(5)  # the columns of a summary
SUMMARY = 5


def normed(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm over the last axis."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return gain * wide.to(x.dtype)


def project(
    x: Tensor,
    gain: Tensor,
    eps: float,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
) -> Tensor:
    """The norm of `x` [tokens, hidden] through several matrices, side by side.

    Args:
        x: hidden states.
        gain: of the norm, [hidden].
        eps: of the norm.
        weights: [out_i, hidden] each.
        biases: [out_i] or None for each.

    Returns:
        [tokens, sum of out_i]
    """
    x = normed(x, gain, eps)
    pairs = zip(weights, biases, strict=True)
    return torch.cat([F.linear(x, weight, bias) for weight, bias in pairs], dim=-1)


def gated(x: Tensor, gain: Tensor, eps: float, gate: Tensor, up: Tensor) -> Tensor:
    """The norm of `x` [tokens, hidden] through a gated layer: silu(gate) * up, [tokens, inner]."""
    x = normed(x, gain, eps)
    return F.silu(F.linear(x, gate)) * F.linear(x, up)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of [tokens, heads, head_dim] by cos and sin [tokens, 1, head_dim]."""
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-high, low], dim=-1) * sin


def write(
    projected: Tensor,
    heads: Heads,
    gains: tuple[Tensor, Tensor, float] | None,
    table: tuple[Tensor, Tensor],
    plan: Plan,
    keys: Tensor,
    values: Tensor,
) -> Tensor:
    """Norm and rotate queries and keys, and write K/V where the plan says.

    Args:
        projected: [tokens, (query + 2 kv) * dim]: queries, if `heads.query`, keys and values.
        heads: how they are divided.
        gains: of the norms of queries and keys [head_dim] and their eps, in families that have one.
        table: cos and sin, [capacity, head_dim] each.
        plan: slots and positions of the tokens.
        keys: [slots, kv_heads, capacity, head_dim], written.
        values: the same shape, written.

    Returns:
        The queries [tokens, heads.query, head_dim].
    """
    by_head = projected.view(len(projected), -1, heads.dim)
    query, key, value = by_head.split((heads.query, heads.kv, heads.kv), dim=1)
    if gains is not None:
        query, key = normed(query, gains[0], gains[2]), normed(key, gains[1], gains[2])
    cos, sin = (part.index_select(0, plan.positions)[:, None] for part in table)
    keys[plan.slots, :, plan.positions] = rotate(key, cos, sin)
    values[plan.slots, :, plan.positions] = value
    return rotate(query, cos, sin)


def attend(
    query: Tensor, keys: Tensor, values: Tensor, plan: Plan, scale: float, window: int | None
) -> Tensor:
    """Attention of each token to its row's keys up to its own position.

    Args:
        query: [tokens, heads, head_dim].
        keys: [slots, kv_heads, capacity, head_dim], this block's included.
        values: the same shape.
        plan: where the tokens stand.
        scale: of the scores.
        window: positions a token sees, its own included; None is all.

    Returns:
        [tokens, heads * head_dim]; what it holds for tokens that fill up means nothing.
    """
    tokens, heads, _ = query.shape
    at = torch.arange(keys.shape[2], device=query.device)
    allowed = at <= plan.positions[:, None]
    if window is not None:
        allowed &= at > plan.positions[:, None] - window
    if len(keys) == 1:
        query, mask = query.transpose(0, 1)[None], allowed[None, None]
    else:
        keys, values = keys.index_select(0, plan.slots), values.index_select(0, plan.slots)
        query, mask = query[:, :, None], allowed[:, None, None]
    mixed = F.scaled_dot_product_attention(
        query, keys, values, attn_mask=mask, scale=scale, enable_gqa=heads != keys.shape[1]
    )
    return mixed.transpose(1, 2).reshape(tokens, -1)


def read_out(
    hidden: Tensor, gain: Tensor, eps: float, head: Tensor, logits: Tensor, summary: Tensor
) -> None:
    """Final norm and LM head, and what a check wants to know of the logits.

    Args:
        hidden: [tokens, hidden], not normed.
        gain: of the final norm, [hidden].
        eps: of the final norm.
        head: [vocab, hidden].
        logits: [tokens, vocab], written.
        summary: [tokens, 5] float32, written: largest and second largest logit, the token of the
            largest (the first of equals), logsumexp, and the entropy in nats.
    """
    torch.mm(normed(hidden, gain, eps), head.t(), out=logits)
    wide = logits.float()
    top = wide.topk(2, dim=-1).values
    total = wide.logsumexp(-1)
    chances = (wide - total[:, None]).exp()
    summary[:, TOP : SECOND + 1] = top
    summary[:, TOKEN] = wide.argmax(-1)
    summary[:, LOGSUMEXP] = total
    summary[:, ENTROPY] = torch.special.entr(chances).sum(-1)
