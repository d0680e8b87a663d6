"""Collecting traces: decode at full depth, then read every exit out along the finished text.

With a directory, finished shards are kept there: a second call does only what is missing. Several
processes, as `accelerate launch` and `torchrun` start them, share the shards of one directory out.
"""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adaptive_gen.confidence import MEASURES
from adaptive_gen.decoder import Decoder
from adaptive_gen.engine.cache import KVCache
from adaptive_gen.errors import CalibrationError, OptionError
from adaptive_gen.paired import generate
from adaptive_gen.ui import progress

from . import trace as traces
from .trace import Trace, padded

SHARD = 8  # texts: the most that an interruption loses


def collect(
    model: Any,
    prompts: Sequence[Tensor],
    exit_layers: tuple[int, ...],
    max_new_tokens: int,
    work: Path | None = None,
) -> Trace:
    """Trace the full-depth greedy continuations of the prompts.

    Args:
        model: wrapped.
        prompts: token ids [1, time] each.
        exit_layers: ascending; the last is full depth.
        max_new_tokens: texts end there, or earlier by themselves.
        work: where shards are kept; they must be of this model and these prompts.
    """
    decoder = Decoder(model)
    workers = _workers(work)
    index, count = (0, 1) if workers is None else (workers.process_index, workers.num_processes)
    if work is not None and index == 0:
        for part in work.glob(".*.part"):  # of a process that was killed
            part.unlink(missing_ok=True)
    if workers is not None:
        workers.wait_for_everyone()
    starts = range(index * SHARD, len(prompts), count * SHARD)
    bar = progress(starts, f"collecting traces of {len(prompts)} prompts", total=len(starts))
    found = {}
    for start in bar:
        path = _path(work, start)
        shard = None if path is None else _finished(path)
        if shard is None:
            part = prompts[start : start + SHARD]
            rows = [_trace(model, decoder, ids, exit_layers, max_new_tokens) for ids in part]
            shard = traces.join(rows)
            if path is not None:
                traces.save(shard, path)
        found[start] = shard
    if workers is not None:
        workers.wait_for_everyone()
    for start in range(0, len(prompts), SHARD):  # those of the others
        if start not in found:
            path = _path(work, start)
            assert path is not None
            found[start] = traces.load(path)
    return traces.join([found[start] for start in sorted(found)])


def _path(work: Path | None, start: int) -> Path | None:
    return None if work is None else work / f"traces-{start // SHARD:05d}.npz"


def _workers(work: Path | None) -> Any:
    """The processes that collect together; None for one alone."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return None
    if work is None:
        raise OptionError("several processes need one directory to collect in; give --work.")
    from accelerate import PartialState

    return PartialState()


def _finished(path: Path) -> Trace | None:
    """A shard of an earlier run; one that cannot be read is made anew."""
    try:
        return traces.load(path)
    except CalibrationError:
        return None


@torch.no_grad()
def _trace(
    model: Any, decoder: Decoder, ids: Tensor, exit_layers: tuple[int, ...], max_new_tokens: int
) -> Trace:
    out, _ = generate(model, ids, adaptive=True, threshold=1.0, max_new_tokens=max_new_tokens)
    text = out.sequences
    new = text[0, ids.shape[1] :]
    exits = len(exit_layers) - 1
    choices, scores = [], {name: [] for name in MEASURES}
    for exit_layer, hidden in along(decoder, text[:, :-1], exit_layers[:-1]):
        logits = decoder.readout(hidden[0, ids.shape[1] - 1 :], exit_layer)  # [new, vocab]
        choices.append((logits.argmax(-1) == new).cpu().numpy())
        for name, measure in MEASURES.items():
            scores[name].append(measure(logits).cpu().double().numpy())
    return Trace(
        exit_layers=exit_layers,
        lengths=np.array([len(new)]),
        confidence={n: padded([np.stack(s, axis=-1)], exits) for n, s in scores.items()},
        agrees=padded([np.stack(choices, axis=-1)], exits),
        texts=(text[0].cpu().numpy(),),
    )


@torch.no_grad()
def along(
    decoder: Decoder, ids: Tensor, exit_layers: tuple[int, ...]
) -> Iterator[tuple[int, Tensor]]:
    """Run a whole text [1, time] and stop at every exit on the way.

    Yields:
        (exit layer, hidden states [1, time, hidden] there, not normed), shallow to deep.
    """
    cache = KVCache(decoder.n_layers, capacity=ids.shape[1])
    hidden, start = decoder.embed(ids), 0
    for exit_layer in exit_layers:
        hidden = decoder.run(hidden, start, exit_layer, cache)
        start = exit_layer
        yield exit_layer, hidden
