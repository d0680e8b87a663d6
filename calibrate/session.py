"""A calibration between two stages: the model, and what its store holds so far."""

from collections.abc import Mapping
from functools import cached_property
from typing import Any

from adaptive_gen.calibration import differences, fingerprint
from adaptive_gen.confidence import GATE
from adaptive_gen.errors import CalibrationError
from adaptive_gen.gate import Gate
from adaptive_gen.settings import state

from . import trace as traces
from .certify import Step
from .cost import TERMS, Cost
from .finish import draft
from .found import Found, parse_candidate
from .search import Candidate
from .stages import Options
from .store import Store
from .trace import Trace


class Session:
    """Reads each stage's result when it is asked for."""

    def __init__(self, model: Any, tokenizer: Any, store: Store, changes: Mapping[str, Any]):
        """Open it.

        Args:
            model: wrapped.
            tokenizer: the model's.
            store: where the stages keep what they find.
            changes: options of this stage; those fixed by `collect` come from the store, those
                fixed by `search` from what it left.
        """
        self.model, self.tokenizer, self.store = model, tokenizer, store
        fixed = {name: store.job[name] for name in ("kv", "max_new_tokens", "seed")}
        if not changes and store.path("options").exists():
            changes = store.read("options", "search")
        elif changes:
            store.write("options", dict(changes))
        self.options = Options(**fixed, **changes)

    @property
    def differing(self) -> list[str]:
        """What the model at hand differs in from the one that was collected from."""
        here = fingerprint(self.model, state(self.model).backend.name, self.tokenizer)
        return differences(self.store.job["fingerprint"], here)

    @cached_property
    def trace(self) -> Trace:
        """Of all prompts."""
        return traces.load(self.store.directory / "traces.npz")

    @cached_property
    def cost(self) -> Cost:
        """This device's.

        Raises:
            CalibrationError: it has other terms than the cost model of this version.
        """
        found = Cost(**self.store.read("cost", "profile"))
        if set(found.seconds) != set(TERMS):
            raise CalibrationError(
                f"{self.store.path('cost')} is of another version's cost model; run "
                "`calibrate profile` again."
            )
        return found

    @cached_property
    def found(self) -> Found:
        """By the search."""
        return Found.parse(self.store.read("search", "search"))

    @cached_property
    def replayed(self) -> tuple[list[Candidate], list[float]]:
        """Settings and their mean losses."""
        document = self.store.read("replay", "replay")
        return list(map(parse_candidate, document["front"])), document["means"]

    @cached_property
    def steps(self) -> list[Step]:
        """Of the certification."""
        rows = self.store.read("certify", "certify")
        return [Step(**{**row, "candidate": parse_candidate(row["candidate"])}) for row in rows]

    def use_draft(self) -> None:
        """Give the model the maps that the thresholds refer to, and the gate if they do."""
        if self.found.measure == GATE:
            state(self.model).gate = Gate.load(self.store.directory)
        state(self.model).calibration = draft(
            self.model, self.trace, self.found, self.cost, self.options, self.store.job
        )
