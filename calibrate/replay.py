"""Exact replay: what a setting does with a text, without generating it.

Take the text that full depth wrote after a prompt. Up to and including the first token where an
early exit would choose another one, decoding with that setting sees the same tokens, so one
parallel pass over the finished text tells who leaves where and what they choose:

- `recompute`: every key and value is full depth's, so the traces say it all; only the queues, which
  force a deep pass when they are full, have to be followed (schedule.py).
- `propagate`: a token that has left keeps its hidden state, and the layers it skipped see that. The
  pass goes layer by layer and *freezes* the rows that have left.

Behind the first divergence the real run writes a different text and the replay says nothing of it.

Axes: `texts`, `time` (new tokens).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adaptive_gen.calibration import ConfidenceMap
from adaptive_gen.confidence import MEASURES
from adaptive_gen.decoder import Decoder
from adaptive_gen.engine.cache import KVCache
from adaptive_gen.ui import progress

from . import maps
from .schedule import simulate
from .trace import Trace


@dataclass(frozen=True)
class Rule:
    """Who leaves where: one setting of the dial."""

    measure: str
    curves: Mapping[int, ConfidenceMap]  # exit layer -> map; an exit without one is judged raw
    thresholds: Mapping[int, float]  # of the exits that are checked

    def leaves(self, exit_layer: int, raw: NDArray) -> NDArray[np.bool_]:
        """Which of the raw confidences reach the threshold of a checked exit."""
        curve = self.curves.get(exit_layer)
        chance = raw if curve is None else maps.apply(curve, raw)
        threshold = self.thresholds[exit_layer]
        return (chance >= threshold) & (threshold < 1)  # 1.0 never exits, as in the engine


@dataclass(frozen=True)
class Replayed:
    """What one setting does with every text, up to the text's first divergence."""

    lengths: NDArray[np.int64]  # [texts]
    depths: NDArray[np.int16]  # [texts, time]: layers each token ran; 0 is padding
    same: NDArray[np.bool_]  # [texts, time]: it is the token full depth wrote; True in padding

    @property
    def first_divergence(self) -> NDArray[np.int64]:
        """Index of the first other token of each text; its length where there is none."""
        return np.where(self.same.all(1), self.lengths, self.same.argmin(1))

    @property
    def prefix_loss(self) -> NDArray[np.float64]:
        """Share [texts] of each text that lies behind its first divergence, that token included.

        No position-by-position comparison of the two texts can find more mismatches than this.
        """
        return 1 - self.first_divergence / self.lengths

    @property
    def exact_loss(self) -> NDArray[np.float64]:
        """1 for each text that differs anywhere, 0 for the others."""
        return (self.first_divergence < self.lengths).astype(float)


def replay(trace: Trace, rule: Rule, *, kv: str, queue_cap: int, model: Any = None) -> Replayed:
    """Replay one setting over traced texts.

    Args:
        trace: of full depth; with texts where `kv` is "propagate".
        rule: the setting; its exits are among the trace's.
        kv: "recompute" or "propagate".
        queue_cap: the engine's.
        model: needed where `kv` is "propagate".
    """
    if kv == "recompute":
        return _from_trace(trace, rule, queue_cap)
    decoder = Decoder(model)
    depths = np.zeros(trace.real.shape, np.int16)
    same = np.ones(trace.real.shape, bool)
    texts = progress(enumerate(trace.texts), "replaying", total=len(trace.texts))
    for i, text in texts:
        length = int(trace.lengths[i])
        ids = torch.from_numpy(text)[None].to(model.device)
        depths[i, :length], same[i, :length] = frozen_pass(decoder, ids, length, rule)
    return Replayed(trace.lengths, depths, same)


def _from_trace(trace: Trace, rule: Rule, queue_cap: int) -> Replayed:
    exits = trace.exit_layers[:-1]
    raw = trace.confidence[rule.measure]
    leaves = np.zeros((*raw.shape, 1), bool)
    for k, e in enumerate(exits):
        if e in rule.thresholds:
            leaves[..., k, 0] = rule.leaves(e, raw[..., k])
    # An exit with a threshold of 1 is not even asked.
    checked = np.array([[rule.thresholds.get(e, 1.0) < 1] for e in exits])
    outcome = simulate(
        trace.exit_layers, trace.lengths, trace.agrees, leaves, checked, "recompute", queue_cap
    )
    depths = outcome.depths[..., 0]
    other = np.zeros(depths.shape, bool)
    for k, e in enumerate(exits):
        other |= (depths == e) & ~trace.agrees[..., k]
    return Replayed(trace.lengths, depths, ~other)


@torch.no_grad()
def frozen_pass(
    decoder: Decoder, ids: Tensor, new: int, rule: Rule
) -> tuple[NDArray[np.int16], NDArray[np.bool_]]:
    """Replay `propagate` over one text in one pass.

    Args:
        decoder: the model.
        ids: [1, time] prompt and full-depth text.
        new: new tokens of it.
        rule: the setting.

    Returns:
        depths [new], and whether each chosen token is the text's [new].
    """
    rows, target = ids[:, :-1], ids[0, -new:]
    first = rows.shape[1] - new  # the row that chooses the first new token
    hidden, cache = decoder.embed(rows), KVCache(decoder.n_layers, capacity=rows.shape[1])
    going = torch.ones(rows.shape[1], dtype=torch.bool, device=ids.device)
    depths = np.full(new, decoder.n_layers, np.int16)
    same = np.ones(new, bool)

    def read_out(where: Tensor, layer: int) -> Tensor:
        """Logits [n, vocab] of some rows; notes whether they choose the text's tokens."""
        logits = decoder.readout(hidden[0, where], layer)
        hit = logits.argmax(-1) == target[where - first]
        same[(where - first).cpu().numpy()] = hit.cpu().numpy()
        return logits

    for layer in range(decoder.n_layers):
        if layer in rule.thresholds and rule.thresholds[layer] < 1:
            # The prompt runs at full depth, and so does the new token it ends with.
            asked = going.nonzero()[:, 0]
            asked = asked[asked > first]
            raw = MEASURES[rule.measure](read_out(asked, layer)).cpu().double().numpy()
            left = asked[torch.from_numpy(rule.leaves(layer, raw)).to(asked.device)]
            depths[(left - first).cpu().numpy()] = layer
            going[left] = False
        out = decoder.run(hidden, layer, layer + 1, cache)
        hidden = torch.where(going[:, None], out, hidden)
    deepest = going.nonzero()[:, 0]
    read_out(deepest[deepest >= first], decoder.n_layers)
    return depths, same


LOSSES: Mapping[str, Callable[[Replayed], NDArray[np.float64]]] = {
    "prefix": lambda replayed: replayed.prefix_loss,
    "exact": lambda replayed: replayed.exact_loss,
}
