"""A Hugging Face causal LM seen as four things: embed, run layers a..b, store K/V only, read out.

Axes: `batch`, `time`, `hidden`, `vocab`. Depth is an argument: the model's configuration is
read and never written. Which models qualify is decided by `probe`, not by a list of names.
"""

import copy
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .engine.cache import Block, KVCache, Span, StoreOnly
from .engine.positions import Positions
from .errors import ModelError
from .exit_readouts import exits_of, readouts
from .head import Head
from .naming import Parts, PlainEmbedding, check_attention


class Decoder:
    """The layers, norm and head of a loaded model, callable one run of layers at a time."""

    def __init__(self, model: Any):
        """Find the parts of `model`.

        Raises:
            ModelError: one is missing, the layers need more than hidden states, positions, masks
                and K/V, or there is but one.
        """
        self.name = name = type(model).__name__
        check_attention(model)
        self._parts, self._head = Parts(model), Head(model)
        self.own = readouts(model, exits_of(model))  # exit layer -> a readout of its own
        self._parts.check_layers()
        self.config = config = model.config.get_text_config()
        self.n_layers = len(self.layers)
        if self.n_layers < 2:
            raise ModelError(f"{name} has 1 layer; adaptive depth needs at least 2.")
        self.positions = Positions(self._parts, config, self.n_layers)

    @property
    def layers(self) -> Any:
        """The model's decoder layers, in order."""
        return self._parts.layers

    @property
    def dtype(self) -> torch.dtype:
        """Of the layers' weights."""
        return next(self.layers[0].parameters()).dtype

    def with_layer(self, index: int, layer: Any) -> "Decoder":
        """The same decoder, which runs another layer in place of one of the model's."""
        decoder = copy.copy(self)
        decoder._parts = self._parts.with_layer(index, layer)
        return decoder

    def embed(self, ids: Tensor, start: int | Sequence[int] | Tensor = 0) -> Tensor:
        """Token ids [batch, time] -> hidden states [batch, time, hidden] before the first layer.

        Args:
            ids: token ids, [batch, time].
            start: position of the first token of every row, or of each row ([batch]); it matters
                to families with learned positions.
        """
        if not self._parts.learned_positions:
            return self._parts.embed(ids)
        first = torch.as_tensor(start, device=ids.device).reshape(-1, 1)
        return self._parts.embed(ids, first + torch.arange(ids.shape[1], device=ids.device))

    def run(
        self, hidden: Tensor, start: int, stop: int, cache: KVCache, span: Span | None = None
    ) -> Tensor:
        """Run layers `start`..`stop` (half open) on a block.

        Args:
            hidden: [batch, time, hidden] before layer `start`.
            start: layers already run.
            stop: layers that have run afterwards.
            cache: gains the block's K/V in these layers, which must hold equally many tokens.
            span: the block's place in `cache`; None is behind what each of its rows holds.

        Returns:
            [batch, time, hidden] after layer `stop` - 1, not normed.
        """
        span = span or cache.span(start, (hidden.shape[1],) * cache.batch)
        cache.pair(0)
        block, place = self.positions.block(hidden, span), Block(cache, span)
        for index in range(start, stop):
            hidden = self._call(index, hidden, block, place)
        return hidden

    def store(
        self, hidden: Tensor, start: int, stop: int, cache: KVCache, span: Span | None = None
    ) -> None:
        """Give layers `start`..`stop` the keys and values of `hidden` without running them.

        Every layer projects the same `hidden`, as if the skipped layers had changed nothing:
        approximate KV propagation (CALM, Schuster et al. 2022).
        """
        span = span or cache.span(start, (hidden.shape[1],) * cache.batch)
        cache.pair(0)
        block, place = self.positions.block(hidden, span), StoreOnly(cache, span)
        for index in range(start, stop):
            try:
                self._call(index, hidden, block, place)
            except StoreOnly.Stored:
                continue

    def _call(self, index: int, hidden: Tensor, block: Any, cache: Any) -> Tensor:
        kind = self.positions.layer_types[index]
        return self._parts.call(
            index, hidden, block.masks[kind], block.position_ids, block.embeddings[kind], cache
        )

    def readout(self, hidden: Tensor, exit_layer: int | None = None) -> Tensor:
        """Hidden states after any layer -> logits, through the shared final norm and LM head.

        Args:
            hidden: [..., hidden], not normed.
            exit_layer: where they are; an exit with a readout of its own is read out through that.

        Returns:
            [..., vocab] with the model's own logit scale and soft-capping applied.
        """
        if exit_layer in self.own:
            return self.own[exit_layer](hidden)
        return self._head(self._parts.norm(hidden))

    @property
    def plain_embedding(self) -> PlainEmbedding | None:
        """What `embed` comes to, where it is no more than that; else None."""
        return self._parts.plain_embedding

    @property
    def plain_readout(self) -> tuple[Any, Any, float, float | None] | None:
        """Final norm, LM head, a factor, a soft cap: where `readout` is no more; else None."""
        norm, multiplier = self._parts.final_norm, self._head.multiplier
        if norm is None or self._parts.project_out is not None or multiplier is None:
            return None
        return norm, self._head.linear, multiplier, self._head.softcap

    def normed(self, hidden: Tensor, exit_layer: int | None = None) -> Tensor:
        """Hidden states [..., hidden] as the LM head sees them: through the final norm."""
        if exit_layer in self.own:
            return self.own[exit_layer].norm(hidden)
        return self._parts.norm(hidden)

    @torch.no_grad()
    def readouts(self, ids: Tensor, exit_layers: Iterable[int]) -> Iterator[tuple[int, Tensor]]:
        """Run a whole text at full depth and read it out at every exit on the way.

        Args:
            ids: [batch, time] token ids.
            exit_layers: ascending counts of layers; no layer beyond the last is run.

        Yields:
            (exit layer, logits [batch, time, vocab]), shallow to deep.
        """
        cache = KVCache(self.n_layers, capacity=ids.shape[1], batch=ids.shape[0])
        hidden, start = self.embed(ids), 0
        for exit_layer in exit_layers:
            hidden = self.run(hidden, start, exit_layer, cache)
            start = exit_layer
            yield exit_layer, self.readout(hidden, exit_layer)


@torch.no_grad()
def probe(model: Any, decoder: Decoder) -> None:
    """Check that running `model` layer by layer gives what the model itself gives.

    Twelve random tokens go through in every way the engine uses: a prompt, one token, a block, and
    tokens whose deep layers are caught up later.

    Raises:
        ModelError: the layers cannot be called, or the logits differ beyond rounding.
    """
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(decoder.config.vocab_size, (1, 12), generator=generator).to(model.device)
    was_training = model.training
    model.eval()
    try:
        reference = model(input_ids=ids, use_cache=False).logits.float()
        split = _split_run(decoder, ids).float()
    except (TypeError, AttributeError, KeyError, RuntimeError, ValueError) as error:
        raise ModelError(
            f"{decoder.name} cannot be run layer by layer ({type(error).__name__}: {error}). "
            "Use the model without adaptive_gen."
        ) from error
    finally:
        model.train(was_training)
    scale = float(reference.abs().max())
    difference = float((split - reference).abs().max())
    # Norms and softmax work in float32 even in a float64 model.
    precision = max(torch.finfo(model.dtype).eps, torch.finfo(torch.float32).eps)
    tolerance = scale * precision**0.5
    if not difference <= tolerance:
        raise ModelError(
            f"{decoder.name} run layer by layer differs from the model itself by {difference:.2g} "
            f"in its logits ({tolerance:.2g} is allowed). Use the model without adaptive_gen."
        )


def _split_run(decoder: Decoder, ids: Tensor) -> Tensor:
    """Logits [1, 12, vocab] of a prompt of 5, one token, a block of 3 and 3 caught up at last."""
    n_layers, middle = decoder.n_layers, decoder.n_layers // 2
    cache = KVCache(n_layers, capacity=4)
    logits = []
    for part in ids[:, :9].split([5, 1, 3], dim=1):
        shallow = decoder.run(decoder.embed(part, cache.lengths[0]), 0, middle, cache)
        logits.append(decoder.readout(decoder.run(shallow, middle, n_layers, cache)))
    waiting = [
        decoder.run(decoder.embed(ids[:, i, None], i), 0, middle, cache) for i in (9, 10, 11)
    ]
    logits.append(decoder.readout(decoder.run(torch.cat(waiting, 1), middle, n_layers, cache)))
    return torch.cat(logits, 1)
