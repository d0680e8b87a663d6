"""What the search hands on: a measure, its maps, and the settings worth trying."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from adaptive_gen.calibration import ConfidenceMap, parse_placement

from .certify import Promise
from .replay import Rule
from .search import Candidate, Placement
from .target import Target

Curves = Mapping[str, Mapping[int, ConfidenceMap]]  # measure -> exit layer -> map


@dataclass(frozen=True)
class Found:
    """A search's result, for the prompts behind the first `searched` to judge."""

    target: Target
    promise: Promise | None  # what to certify; None where the target is no risk
    measure: str
    curves: Curves
    front: tuple[Candidate, ...]  # slowest first
    searched: int  # texts that were searched on, the first of the traces
    quality: tuple[Mapping[str, Any], ...] = field(default=())  # of the measures, on unseen texts
    placement: Placement = ()  # which exits are worth a check at which threshold

    def rule(self, candidate: Candidate) -> Rule:
        """A setting as the replay takes it."""
        return Rule(self.measure, self.curves[self.measure], candidate.thresholds)

    def document(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)

    @classmethod
    def parse(cls, document: Mapping[str, Any]) -> "Found":
        """From JSON."""
        promise = document["promise"]
        return cls(
            target=Target(**document["target"]),
            promise=None if promise is None else Promise(**promise),
            measure=document["measure"],
            curves={
                measure: {
                    int(layer): ConfidenceMap(tuple(c["raw"]), tuple(c["chance"]))
                    for layer, c in by_layer.items()
                }
                for measure, by_layer in document["curves"].items()
            },
            front=tuple(map(parse_candidate, document["front"])),
            searched=document["searched"],
            quality=tuple(document["quality"]),
            placement=parse_placement(document.get("placement", [])),
        )


def parse_candidate(document: Mapping[str, Any]) -> Candidate:
    """A setting from JSON."""
    threshold = document["threshold"]
    return Candidate(
        **{
            **document,
            "threshold": tuple(threshold) if isinstance(threshold, list) else threshold,
            "exit_layers": tuple(document["exit_layers"]),
        }
    )
