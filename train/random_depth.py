"""Layers that some rows or some tokens pass by while the model trains."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def layer_dropout(layers: Sequence[nn.Module], probability: float) -> Iterator[None]:
    """Let rows of a batch skip layers while the block lasts.

    Layer l of L (counted from 0) is skipped with `probability` * (2 ** (l / (L - 1)) - 1), drawn
    for each row: never the first layer, `probability` at the last (LayerSkip, arXiv 2404.16710).
    Layers in eval mode skip nothing.

    Args:
        layers: decoder layers; their output takes the shape of their input.
        probability: of the last layer, in [0, 1).
    """
    depth = max(len(layers) - 1, 1)

    def drop(share: float) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
            if not module.training or share == 0.0:
                return None
            before = args[0] if args else kwargs["hidden_states"]
            skips = torch.rand(len(before), 1, 1, device=before.device) < share
            return _with_hidden(output, torch.where(skips, before, _hidden(output)))

        return hook

    shares = [probability * (2 ** (i / depth) - 1) for i in range(len(layers))]
    hooks = [
        layer.register_forward_hook(drop(share), with_kwargs=True)
        for layer, share in zip(layers, shares, strict=True)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class Departures:
    """Where each token of the batch in hand leaves: layers it runs through, [batch, length]."""

    depth: Tensor

    def draw(self, shape: Sequence[int], exits: Sequence[int], share: float, device: Any) -> None:
        """Send `share` of the tokens out at one of the inner exits, all equally likely."""
        *inner, full = exits
        chosen = torch.tensor(inner, device=device)[
            torch.randint(len(inner), tuple(shape), device=device)
        ]
        stays = torch.rand(tuple(shape), device=device) >= share
        self.depth = torch.where(stays, full, chosen)

    def shares(self, weights: Sequence[float], exits: Sequence[int], share: float) -> Tensor:
        """Weight of every exit at every position, [exits, batch, length].

        An exit learns from the tokens that reach it. Dividing by how many do on average keeps the
        exits' weights against each other what the objective says.
        """
        rows = []
        for index, (weight, exit_layer) in enumerate(zip(weights, exits, strict=True)):
            reach = 1.0 - share * index / max(len(exits) - 1, 1)
            rows.append((self.depth >= exit_layer) * (weight / reach if reach > 0 else 0.0))
        return torch.stack(rows)


@contextmanager
def leaving(
    backbone: Any, layers: Iterable[Any], exits: Sequence[int], share: float
) -> Iterator[Departures]:
    """Let each token leave at an exit of its own while the block lasts.

    A token that has left keeps its hidden state. The layers above still norm and project that
    state to keys and values, as `kv="propagate"` does in decoding, so the tokens that stay learn
    to attend to what they will find there.

    Args:
        backbone: the decoder.
        layers: its layers, whatever it calls them.
        exits: ascending, full depth last; at least one before it.
        share: of the tokens that leave before full depth.
    """
    departures = Departures()

    def start(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        ids = kwargs["input_ids"]
        departures.draw(ids.shape, exits, share if module.training else 0.0, ids.device)

    def pass_by(index: int) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
            before = args[0] if args else kwargs["hidden_states"]
            gone = (departures.depth <= index)[..., None]
            return _with_hidden(output, torch.where(gone, before, _hidden(output)))

        return hook

    hooks = [backbone.register_forward_pre_hook(start, with_kwargs=True)]
    for index, layer in enumerate(layers):
        hooks.append(layer.register_forward_hook(pass_by(index), with_kwargs=True))
    try:
        yield departures
    finally:
        for hook in hooks:
            hook.remove()


def _hidden(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _with_hidden(output: Any, hidden: Tensor) -> Any:
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden
