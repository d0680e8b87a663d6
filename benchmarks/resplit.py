"""Do certificates hold on fresh prompts? One collection, split again and again.

    calibrate collect --work RUN --prompts PROMPTS.txt      # 400 prompts or more
    calibrate profile --work RUN
    python -m benchmarks.resplit --work RUN --out NAME.json

The search sees the first part of the prompts, as in `calibrate run`. The others are split 100
times: one half certifies, by the code of `calibrate run`; the mean loss of the setting that it
certifies is then taken on the other half. `prefix` and `exact` are replayed; `rouge` and `em`
decode what the replay finds changed, once for every setting that is ever tested. Per loss and
limit:

- `violated`: splits whose mean loss on the fresh half is above the limit. 5 of 100 are the bar.
- `by_chance`: how many that would be if every fresh half were drawn anew from all the prompts not
  searched on: half a sample has a noisy mean, and a setting close below its limit often shows one
  above. `violated` may be larger still, as halves share out one pool: a lucky half that certifies
  leaves an unlucky one.
- `wrong`: splits whose setting is above the limit on both halves together, the best estimate of
  what the certificate speaks of.

Splits without any certificate violate nothing; `certified` counts the others. All share one
collection and are not independent trials: those are in tests/test_calibrate_certify.py.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adaptive_gen import ui
from adaptive_gen.bench import environment
from adaptive_gen.calibrate import certify
from adaptive_gen.calibrate.certify import Promise
from adaptive_gen.calibrate.finish import draft
from adaptive_gen.calibrate.search import Candidate
from adaptive_gen.calibrate.session import Session
from adaptive_gen.calibrate.stages import losses_of, replay_stage, search_stage
from adaptive_gen.calibrate.store import Store
from adaptive_gen.calibrate.target import Target
from adaptive_gen.errors import CalibrationError
from adaptive_gen.files import whole
from adaptive_gen.options import load_model
from adaptive_gen.settings import state

LIMITS = {"prefix": (0.1, 0.2, 0.3), "exact": (0.2, 0.4), "rouge": (0.1, 0.2), "em": (0.2, 0.4)}
SPLITS = 100
DRAWS = 1000  # fresh halves that `by_chance` is of

LossesOf = Callable[[Candidate], NDArray[np.float64]]  # of a setting on the prompts to split


def prepared(
    session: Session, promise: Promise, scratch: Store
) -> tuple[list[tuple[Candidate, float]], LossesOf, int]:
    """What to test in which order, what it loses on prompts not searched on, and their number."""
    model, trace = session.model, session.trace
    options = replace(session.options, loss=promise.loss, level=promise.level, least_gain=0.0)
    target = Target("risk", promise.max_risk)
    found = search_stage(model, trace, session.cost, target, options, scratch)
    estimates = replay_stage(model, trace, found, options, scratch)
    # What the thresholds refer to, for settings that have to be decoded.
    state(model).calibration = draft(model, trace, found, session.cost, options, session.store.job)
    _, rest = trace.split(found.searched)
    judge = cache(losses_of(model, session.tokenizer, rest, found, options))
    return certify.sequence(*estimates, promise.max_risk), judge, len(rest.lengths)


def resplit(
    ordered: list[tuple[Candidate, float]],
    judge: LossesOf,
    promise: Promise,
    texts: int,
    splits: int,
) -> dict[str, Any]:
    """Certify on one half and judge on the other, many times.

    Args:
        ordered: settings and their estimated losses.
        judge: losses [texts] of a setting.
        promise: what every split certifies.
        texts: to split; none of them was searched on.
        splits: how often.
    """
    draw = np.random.default_rng(0)
    half = texts // 2
    anew = np.array([draw.permutation(texts)[half:] for _ in range(DRAWS)])
    risks, by_chance, whole_risks, speeds = [], [], [], []
    for _ in range(splits):
        order = draw.permutation(texts)
        mine, fresh = order[:half], order[half:]
        steps = certify.certify(ordered, partial(_some, judge, mine), promise)
        good = [step for step in steps if step.certified]
        if not good:
            continue
        chosen = certify.certified(good, promise, half)[-1].candidate
        every = judge(chosen)
        risks.append(every[fresh].mean())
        whole_risks.append(every.mean())
        by_chance.append((every[anew].mean(1) > promise.max_risk).mean())
        speeds.append(chosen.speedup)
    above = [float(risk) > promise.max_risk for risk in risks]
    return {
        "loss": promise.loss,
        "max_risk": promise.max_risk,
        "splits": splits,
        "certified": len(risks),
        "violated": sum(above),
        "by_chance": float(sum(by_chance)),
        "wrong": sum(float(risk) > promise.max_risk for risk in whole_risks),
        "allowed": round((1 - promise.level) * splits, 6),
        "fresh_risk": [float(risk) for risk in risks],
        "mean_fresh_risk": float(np.mean(risks)) if risks else None,
        "predicted_speedup": float(np.mean(speeds)) if speeds else None,
    }


def _some(judge: LossesOf, texts: NDArray, candidate: Candidate) -> NDArray[np.float64]:
    return judge(candidate)[texts]


def opened(work: Path, model: str | None) -> Session:
    """The collection and its model.

    Raises:
        CalibrationError: it was collected from another model, or not profiled.
    """
    store = Store(work)
    loaded, tokenizer = load_model(model, exit_layers=store.job["exit_layers"], calibration=False)
    session = Session(loaded, tokenizer, store, {})
    if session.differing:
        names = " and ".join(session.differing)
        raise CalibrationError(f"{work} was collected from another {names}. Name it with --model.")
    return session


def run(session: Session, names: list[str], splits: int) -> list[dict[str, Any]]:
    """One entry per loss and limit."""
    rows = []
    with tempfile.TemporaryDirectory() as directory:  # what the stages write is not to be kept
        scratch = Store(Path(directory), session.store.job)
        for name in names:
            for limit in LIMITS[name]:
                promise = Promise(limit, loss=name)
                ordered, judge, texts = prepared(session, promise, scratch)
                promise.check_enough(texts // 2)
                rows.append(resplit(ordered, judge, promise, texts, splits))
    return rows


def main() -> None:
    """Split, print the table and write the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--model")
    parser.add_argument("--loss", choices=LIMITS, action="append")
    parser.add_argument("--splits", type=int, default=SPLITS)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    started = time.strftime("%Y-%m-%d %H:%M")
    session = opened(options.work, options.model)
    rows = run(session, options.loss or list(LIMITS), options.splits)
    shown = ("loss", "max_risk", "certified", "violated", "by_chance", "wrong", "allowed")
    shown += ("mean_fresh_risk", "predicted_speedup")
    cells = [[row[name] for name in shown] for row in rows]
    ui.table(f"{options.splits} splits", shown, cells)
    result = {
        "started": started,
        **environment(session.model),
        "job": session.store.job,
        "kept": all(row["violated"] <= row["allowed"] for row in rows),
        "rows": rows,
    }
    with whole(options.out, "--out") as file:
        file.write(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
