"""Collecting traces: decode at full depth, then read every exit out along the finished text."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adaptive_gen.confidence import MEASURES
from adaptive_gen.decoder import Decoder
from adaptive_gen.paired import generate
from adaptive_gen.ui import progress

from .trace import Trace, padded


def collect(
    model: Any, prompts: Sequence[Tensor], exit_layers: tuple[int, ...], max_new_tokens: int
) -> Trace:
    """Trace the full-depth greedy continuations of the prompts.

    Args:
        model: wrapped.
        prompts: token ids [1, time] each.
        exit_layers: ascending; the last is full depth.
        max_new_tokens: texts end there, or earlier by themselves.
    """
    decoder = Decoder(model)
    agrees: list[np.ndarray] = []
    confidence: dict[str, list[np.ndarray]] = {name: [] for name in MEASURES}
    for ids in progress(prompts, "collecting traces", total=len(prompts)):
        out, _ = generate(model, ids, adaptive=True, threshold=1.0, max_new_tokens=max_new_tokens)
        choices, scores = _read_out(decoder, out.sequences, ids.shape[1], exit_layers)
        agrees.append((choices[:, :-1] == choices[:, -1:]).cpu().numpy())
        for name, score in scores.items():
            confidence[name].append(score.cpu().double().numpy())
    exits = len(exit_layers) - 1
    return Trace(
        exit_layers=exit_layers,
        lengths=np.array([len(text) for text in agrees]),
        confidence={name: padded(texts, exits) for name, texts in confidence.items()},
        agrees=padded(agrees, exits),
    )


@torch.no_grad()
def _read_out(
    decoder: Decoder, ids: Tensor, prompt: int, exit_layers: tuple[int, ...]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Choices [new, exits + 1] and raw confidences [new, exits] for the new tokens of one text."""
    choices: list[Tensor] = []
    scores: dict[str, list[Tensor]] = {name: [] for name in MEASURES}
    # The last token was chosen but never read from.
    for exit_layer, logits in decoder.readouts(ids[:, :-1], exit_layers):
        new = logits[0, prompt - 1 :]  # [new, vocab]
        choices.append(new.argmax(-1))
        if exit_layer != exit_layers[-1]:
            for name, measure in MEASURES.items():
                scores[name].append(measure(new))
    stacked = {name: torch.stack(columns, dim=-1) for name, columns in scores.items()}
    return torch.stack(choices, dim=-1), stacked
