"""Does a calibrated 0.9 mean 0.9? Agreement of held-out tokens by what the maps promise of them.

    calibrate collect --work RUN                # traces of the prompts that ship
    python -m benchmarks.reliability --work RUN [--others RUN2] --out NAME.json

Maps are fitted to one half of the texts and judged on the other, and the other way round, for
several ways to halve them: every figure is of tokens whose text the map has not seen. The first way
is that of `calibrate run`. `--others` names traces of other prompts: the maps of the first half are
judged on them too. Per measure and exit: tokens, those promised 0.875 to 0.925, how many of these
agree, and the expected calibration error before and after.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from adaptive_gen.calibrate import trace as traces
from adaptive_gen.calibrate.maps import NEAR, Quality, qualities
from adaptive_gen.calibrate.stages import curves_of
from adaptive_gen.confidence import MEASURES

SPLITS = 5
ENOUGH = 500  # tokens promised "0.9"; fewer are too few to judge by
BAR = (0.87, 0.97)


def judged(seen: traces.Trace, unseen: traces.Trace) -> list[Quality]:
    """Maps of some texts, judged on others."""
    return qualities(unseen, {measure: curves_of(seen, measure) for measure in MEASURES})


def pooled(parts: list[list[Quality]]) -> list[dict]:
    """The same rows over several sets of tokens."""
    rows = []
    for same in zip(*parts, strict=True):
        tokens, near = sum(q.tokens for q in same), sum(q.near for q in same)
        kept = sum(q.near * (q.near_agreement or 0) for q in same) / near if near else None
        errors = {
            name: sum(q.tokens * getattr(q, name) for q in same) / tokens
            for name in ("error_before", "error_after")
        }
        first = same[0]
        rows.append(
            {
                "confidence": first.confidence,
                "exit_layer": first.exit_layer,
                "tokens": tokens,
                "near": near,
                "near_agreement": kept,
                **errors,
                "judged": near > ENOUGH,
                "within_bar": kept is not None and BAR[0] <= kept <= BAR[1],
            }
        )
    return rows


def crossed(trace: traces.Trace, seed: int) -> list[dict]:
    """Two halves, each judged by the other's maps; seed 0 keeps the order of `calibrate run`."""
    order = np.arange(len(trace.lengths))
    if seed:
        np.random.default_rng(seed).shuffle(order)
    halves = [_some(trace, part) for part in np.array_split(order, 2)]
    return pooled([judged(*halves), judged(*halves[::-1])])


def _some(trace: traces.Trace, texts: np.ndarray) -> traces.Trace:
    return traces.join([trace.take(slice(i, i + 1)) for i in texts.tolist()])


def main() -> None:
    """Judge the maps and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--others", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    trace = traces.load(options.work / "traces.npz")
    result = {
        "near": NEAR,
        "bar": BAR,
        "enough": ENOUGH,
        "job": json.loads((options.work / "job.json").read_text()),
        "splits": [crossed(trace, seed) for seed in range(SPLITS)],
    }
    if options.others is not None:
        seen, _ = trace.split(len(trace.lengths) // 2)
        others = traces.load(options.others / "traces.npz")
        result["others"] = {
            "job": json.loads((options.others / "job.json").read_text()),
            "rows": pooled([judged(seen, others)]),
        }
    every = [row for rows in result["splits"] for row in rows if row["judged"]]
    result["judged"] = len(every)
    result["within_bar"] = sum(row["within_bar"] for row in every)
    options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
