"""How tokens move through the queues, as values, and where each row is on its way.

Axes: `rows`, `vocab`.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from ..policy import Check
from .drafts import DraftLength

KV_POLICIES = ("recompute", "propagate")
PREFILLS = ("full", "lazy")
# Pending rows are nearly free until a pass stops being bound by reading weights: about 16 on a CPU.
QUEUE_CAP = 16


class Readout(NamedTuple):
    """Rows that left at one layer, together."""

    rows: tuple[int, ...]
    logits: Tensor  # [rows, vocab]
    exit_layer: int
    confidences: list[float]  # what the policy was shown; nan at full depth, where nothing is asked
    # Full-depth logits [drafts, vocab] of each row's tokens that had left since its last deep pass.
    drafts: list[Tensor] | None = None


@dataclass(frozen=True)
class Rules:
    """How tokens move through the queues."""

    kv: str = "recompute"  # how skipped layers get their K/V, or "propagate"
    queue_cap: int = QUEUE_CAP  # most tokens of a row that may wait in front of one segment
    prefill: str = "full"  # "lazy": the prompt, too, goes deeper only when a token needs it
    shallow_passes: int = 1  # runs of the first segment before rows that wait deeper get their turn
    thrifty: bool = False  # exits whose checks do not pay are asked rarely
    read_drafts: bool = False  # deep passes read out the pending tokens they catch up


@dataclass
class Row:
    """Where one text's newest token is."""

    stage: int = -1  # the segment it waits in front of; -1: it has left, the next one is awaited
    position: int = 0  # index, among the new tokens, of the token its readout chooses
    prompt: int = 0  # tokens of the prompt
    drafts: int = 0  # tokens that left early since the last deep pass
    draft_length: DraftLength | None = None  # where these must be confirmed: how many are worth it
    # Those that a stretch has left unconfirmed: token, segment and raw confidence.
    unjudged: list[tuple[int, int, float]] = field(default_factory=list)
    cap: int = QUEUE_CAP
    deep: bool = False  # the newest token must go to the end
    checks: tuple[Check, ...] = ()  # of the newest token, shallow to deep
