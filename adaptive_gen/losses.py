"""The sorted (SoFT) loss: every exit layer decodes through the model's own norm and LM head.

One backbone forward gives the hidden states of all exits; the heads run in chunks of positions, so
the logits of all exits never exist at once.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .errors import OptionError
from .exits import normalise, quarter_points
from .head import Head
from .naming import Parts

try:  # documented since torch 2.13; older releases take the checkpointed chunks
    from torch.nn import LinearCrossEntropyOptions
except ImportError:
    LinearCrossEntropyOptions = None

IGNORE = -100


class SortedLoss(NamedTuple):
    """The loss to minimise, and what it is made of."""

    loss: Tensor
    per_exit: dict[int, Tensor]  # exit layer -> mean cross-entropy, detached


def sorted_loss(model: nn.Module, input_ids: Tensor, labels: Tensor, **options: Any) -> Tensor:
    """The SoFT loss as one scalar; the arguments are those of `sorted_losses`."""
    return sorted_losses(model, input_ids, labels, **options).loss


def sorted_losses(
    model: nn.Module,
    input_ids: Tensor,
    labels: Tensor,
    *,
    exit_layers: Sequence[int] | None = None,
    num_items_in_batch: Tensor | int | None = None,
    distill: float = 0.0,
    weights: Mapping[int, float] | None = None,
    chunk_size: int = 1024,
    **model_inputs: Any,
) -> SortedLoss:
    """Weighted mean over exits of the cross-entropy through the shared final norm and LM head.

    With `distill=d`, an intermediate exit minimises `(1 - d) * CE + d * KL(full depth || exit)`;
    full depth is the detached teacher and keeps its plain cross-entropy.

    Args:
        model: a causal LM of transformers.
        input_ids: token ids, [batch, length].
        labels: the same ids, -100 where nothing is to be learnt; shifted here, as in transformers.
        exit_layers: counts of layers; full depth always belongs to them. Default: the checkpoint's
            `config.exit_layers`, else quarter points.
        num_items_in_batch: labels that count in the whole optimiser step. The sum is divided by it,
            which makes gradient accumulation exact. Default: the labels of this batch.
        distill: share of the divergence from full depth, in [0, 1].
        weights: exit layer -> weight, 1 where absent; only their ratio matters.
        chunk_size: positions whose logits exist at once; a batch that fits in one chunk skips the
            second head forward that larger ones pay for.
        **model_inputs: `attention_mask`, `position_ids`, whatever else the backbone takes.

    Returns:
        The loss and the mean cross-entropy of each exit.
    """
    if not 0.0 <= distill <= 1.0:
        raise OptionError(f"distill is {distill}: give the share of the KL term, from 0 to 1.")
    head = Head(model)
    exits = resolve_exits(model, exit_layers)
    share = exit_weights(exits, weights)
    hidden = exit_states(model, input_ids, exits, **model_inputs)
    keep = labels[:, 1:] != IGNORE
    targets = labels[:, 1:][keep]
    rows = [state[:, :-1][keep] for state in hidden]
    objective, entropies = _exit_sums(head, rows, targets, distill, chunk_size)
    items = targets.numel() if num_items_in_batch is None else num_items_in_batch
    items = torch.as_tensor(items, device=targets.device).clamp(min=1)
    loss = torch.stack([w * o for w, o in zip(share, objective, strict=True)]).sum() / items
    mean = 1.0 / max(targets.numel(), 1)
    per_exit = {e: ce.detach() * mean for e, ce in zip(exits, entropies, strict=True)}
    return SortedLoss(loss, per_exit)


def resolve_exits(model: nn.Module, exit_layers: Sequence[int] | None) -> tuple[int, ...]:
    """The exits asked for, else the checkpoint's, else quarter points; full depth last."""
    config: Any = model.config
    depth = config.get_text_config().num_hidden_layers
    if exit_layers is None:
        exit_layers = getattr(config, "exit_layers", None)
    return normalise(exit_layers, depth) if exit_layers else quarter_points(depth)


def exit_weights(exits: Sequence[int], weights: Mapping[int, float] | None) -> list[float]:
    """Weights of the exits, summing to one."""
    raw = [float((weights or {}).get(e, 1.0)) for e in exits]
    unknown = sorted(set(weights or {}) - set(exits))
    if unknown or min(raw) < 0 or sum(raw) <= 0:
        raise OptionError(
            f"exit weights {dict(weights or {})} do not fit the exits {list(exits)}: "
            "give weights of 0 or more for these layers, one of them above 0."
        )
    return [w / sum(raw) for w in raw]


def exit_states(
    model: nn.Module, input_ids: Tensor, exits: Sequence[int], **model_inputs: Any
) -> list[Tensor]:
    """Hidden states after each exit layer, normed and ready for the LM head; one forward."""
    parts = Parts(model)
    caught: dict[int, Tensor] = {}
    with _catching(parts.layers, exits[:-1], caught):
        out = parts.base(input_ids=input_ids, use_cache=False, **model_inputs)
    return [parts.norm(caught[e]) for e in exits[:-1]] + [out.last_hidden_state]


@contextmanager
def _catching(layers: Any, exits: Sequence[int], caught: dict[int, Tensor]):
    """Keep the outputs of the layers that end at an exit."""

    def keep(exit_layer: int) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            caught[exit_layer] = output[0] if isinstance(output, tuple) else output

        return hook

    hooks = [layers[e - 1].register_forward_hook(keep(e)) for e in exits]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _exit_sums(
    head: Head, rows: list[Tensor], targets: Tensor, distill: float, chunk_size: int
) -> tuple[list[Tensor], list[Tensor]]:
    """Per exit, summed over positions: the objective, and the cross-entropy in it."""
    # An empty batch takes one empty chunk: zeros that still reach every parameter, as DDP demands.
    count = len(targets)
    if count and distill == 0.0 and head.plain and LinearCrossEntropyOptions is not None:
        sums = [_fused_sum(head.linear.weight, row, targets, chunk_size) for row in rows]
        return sums, sums
    chunks = []
    for start in range(0, max(count, 1), chunk_size):
        part = [row[start : start + chunk_size] for row in rows]
        args = (head, targets[start : start + chunk_size], distill, *part)
        single = count <= chunk_size
        chunks.append(_chunk(*args) if single else checkpoint(_chunk, *args, use_reentrant=False))
    objectives, entropies = torch.stack(chunks).sum(0).unbind()
    return list(objectives.unbind()), list(entropies.unbind())


def _fused_sum(weight: Tensor, row: Tensor, targets: Tensor, chunk_size: int) -> Tensor:
    assert LinearCrossEntropyOptions is not None
    options = LinearCrossEntropyOptions(chunking_method=None, batch_chunk_size=chunk_size)
    return F.linear_cross_entropy(row, weight, targets, reduction="sum", options=options)


def _full(logits: Tensor) -> Tensor:
    """Half precision is too coarse for a log-softmax over a vocabulary; double stays double."""
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def _chunk(head: Head, targets: Tensor, distill: float, *rows: Tensor) -> Tensor:
    """[2, exits]: objective and cross-entropy of one chunk of positions."""
    last = _full(head(rows[-1]))
    full = F.cross_entropy(last, targets, reduction="sum")
    teacher = last.detach().log_softmax(-1) if distill else last
    objectives, entropies = [], []
    for row in rows[:-1]:
        scores = _full(head(row)).log_softmax(-1)
        entropy = F.nll_loss(scores, targets, reduction="sum")
        objective = entropy
        if distill:
            gap = F.kl_div(scores, teacher, reduction="sum", log_target=True)
            objective = (1.0 - distill) * entropy + distill * gap
        objectives.append(objective)
        entropies.append(entropy)
    return torch.stack([torch.stack([*objectives, full]), torch.stack([*entropies, full])])
