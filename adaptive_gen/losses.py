"""The sorted (SoFT) loss: every exit layer decodes through the model's own norm and LM head.

One backbone forward gives the hidden states of all exits; `readout` scores them block by block, so
the logits of all exits never exist at once.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .errors import OptionError
from .exits import normalise, quarter_points
from .head import Head
from .naming import Parts
from .readout import Goal, Readout, score

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
    distil: float = 0.0,
    weights: Mapping[int, float] | None = None,
    chunk_size: int = 1024,
    **model_inputs: Any,
) -> SortedLoss:
    """Weighted mean over exits of the cross-entropy through the shared final norm and LM head.

    With `distil=d`, an intermediate exit minimises `(1 - d) * CE + d * KL(full depth || exit)`;
    full depth is the detached teacher and keeps its plain cross-entropy.

    Args:
        model: a causal LM of transformers.
        input_ids: token ids, [batch, length].
        labels: the same ids, -100 where nothing is to be learnt; shifted here, as in transformers.
        exit_layers: counts of layers; full depth always belongs to them. Default: the checkpoint's
            `config.exit_layers`, else quarter points.
        num_items_in_batch: labels that count in the whole optimiser step. The sum is divided by it,
            which makes gradient accumulation exact. Default: the labels of this batch.
        distil: share of the divergence from full depth, in [0, 1].
        weights: exit layer -> weight, 1 where absent; only their ratio matters. An exit that weighs
            0 is not read out.
        chunk_size: positions whose logits exist at once.
        **model_inputs: `attention_mask`, `position_ids`, whatever else the backbone takes.

    Returns:
        The loss and the mean cross-entropy of each exit that was read out.
    """
    if not 0.0 <= distil <= 1.0:
        raise OptionError(f"distil is {distil}: give the share of the KL term, from 0 to 1.")
    readout = shared_readout(model)
    exits = resolve_exits(model, exit_layers)
    share = exit_weights(exits, weights)
    states = exit_states(model, input_ids, exits, **model_inputs)
    return score_exits(
        dict.fromkeys(exits, readout),
        states,
        labels,
        share,
        distil=distil,
        num_items_in_batch=num_items_in_batch,
        chunk_size=chunk_size,
    )


def score_exits(
    readouts: Mapping[int, Readout],
    states: Sequence[Tensor],
    labels: Tensor,
    shares: Sequence[float] | Tensor,
    *,
    distil: float = 0.0,
    num_items_in_batch: Tensor | int | None = None,
    chunk_size: int = 1024,
) -> SortedLoss:
    """The loss of states that are already there; see `sorted_losses`.

    Args:
        readouts: exit layer -> its norm and head, ascending.
        states: per exit, [batch, length, hidden] after its last layer.
        labels: [batch, length], shifted here.
        shares: weight of each exit, or of each exit at each position, [exits, batch, length].
        distil: share of the divergence from full depth.
        num_items_in_batch: what the sum is divided by.
        chunk_size: positions whose logits exist at once.
    """
    keep = labels[:, 1:] != IGNORE
    targets = labels[:, 1:][keep]
    rows = [state[:, :-1][keep] for state in states]
    exact = torch.promote_types(rows[-1].dtype, torch.float32)
    if not isinstance(shares, Tensor):
        shares = torch.tensor(shares, dtype=torch.float64)
    weight = shares.to(targets.device, exact)
    if weight.dim() == 3:
        weight = weight[:, :, :-1][:, keep]
    objective, entropies = score(
        list(readouts.values()), rows, Goal(targets, weight, distil, chunk_size)
    )
    items = targets.numel() if num_items_in_batch is None else num_items_in_batch
    loss = objective / torch.as_tensor(items, device=targets.device).clamp(min=1)
    read = (weight > 0).sum(1) if weight.dim() == 2 else (weight > 0) * targets.numel()
    means = entropies / read.clamp(min=1)
    weighs = (weight > 0).reshape(len(weight), -1).any(1).tolist()
    per_exit = {e: m for e, m, w in zip(readouts, means, weighs, strict=True) if w}
    return SortedLoss(loss, per_exit)


def shared_readout(model: nn.Module) -> Readout:
    """The model's final norm and LM head, which all exits share."""
    head = Head(model)
    return Readout(Parts(model).readout_norm, head)


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
    """Hidden states [batch, length, hidden] after each exit layer, not normed; one forward."""
    parts = Parts(model)
    caught: dict[int, Tensor] = {}
    with _catching(parts.layers, exits, caught):
        parts.base(input_ids=input_ids, use_cache=False, **model_inputs)
    return [caught[e] for e in exits]


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
