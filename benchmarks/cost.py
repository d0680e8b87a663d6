"""How far is the cost model's predicted latency from the clock?

    python -m benchmarks.cost --rounds 5 --out NAME.json

The scripts of `calibrate profile`, full depth, and four sets of exits at two thresholds each take
turns on the same prompts, so that a machine that grows faster or slower does so for all of them.
The cost model is fitted to the scripts alone; the settings are predicted from traces of full
depth's texts. Per KV policy: predicted and measured milliseconds per new token of whole calls, the
largest error, and the largest after one common scale (the median ratio). A setting writes other
texts than full depth, which leave at other depths; so what it really did is priced as well, which
is the cost model's own error.

`--clock thread` counts the thread's CPU seconds: on a machine with other work the wall clock says
what the others do. It is of use only with one thread and on a CPU.
"""

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np

import adaptive_gen
from adaptive_gen.bench import environment
from adaptive_gen.calibrate import profile, search
from adaptive_gen.calibrate.collect import collect
from adaptive_gen.calibrate.cost import TERMS, Cost, fit
from adaptive_gen.calibrate.prompts import ordered, prompt_set
from adaptive_gen.calibrate.schedule import Work
from adaptive_gen.calibrate.stages import PROFILE_TOKENS
from adaptive_gen.paired import generate
from adaptive_gen.prompts import inputs
from adaptive_gen.settings import state

THRESHOLDS = (0.75, 0.92)
PROMPTS = 12


def settings(exits: tuple[int, ...]) -> list[tuple[tuple[int, ...], float]]:
    """Full depth, and sets of exits at two thresholds each."""
    below = exits[:-1]
    sets = dict.fromkeys([(below[0],), (below[len(below) // 2],), (below[0], below[-1]), below])
    return [((), 1.0), *((subset, t) for subset in sets for t in THRESHOLDS)]


def measured(model, prompts, found, kv, tokens, rounds) -> tuple[Cost, np.ndarray, np.ndarray]:
    """The fitted cost model; every setting's milliseconds per new token, measured and priced."""
    n_layers, cap = state(model).n_layers, state(model).queue_cap
    calibration = state(model).calibration
    assert calibration is not None, "the settings' thresholds are calibrated chances"
    exits, confidence = state(model).exit_layers, calibration.confidence
    scripts = profile.scripts(exits, PROFILE_TOKENS)
    turns = rounds * len(prompts)
    scripted = np.zeros((2, len(scripts), turns))
    seconds, counts = np.zeros((2, len(found), turns))
    done = np.zeros((len(found), len(TERMS)))
    for turn in range(-1, turns):
        ids = prompts[turn % len(prompts)]
        for i, script in enumerate(scripts):
            scripted[:, i, turn] = profile.timed(
                model, ids, script, n_layers, kv=kv, confidence=confidence
            )
        for i, (layers, threshold) in enumerate(found):
            out, seconds[i, turn] = generate(
                model,
                ids,
                adaptive=True,
                threshold=threshold,
                exit_layers=[*layers, n_layers],
                kv=kv,
                max_new_tokens=tokens,
            )
            counts[i, turn] = out.report.new_tokens
            if 0 <= turn < len(prompts):
                ran = profile.Scripted(out.exit_layers[0].tolist(), frozenset(layers))
                done[i] += profile.work(ran, exits, kv, cap).table[0]
    # What is typical of a run's share of its round, for each prompt by itself.
    pace = np.concatenate([scripted[0], seconds]).sum(0)
    scale = np.median(pace)
    shares = (seconds / pace).reshape(len(found), rounds, len(prompts))
    new = counts[:, : len(prompts)].sum(1)
    per_token = np.median(shares, axis=1).sum(1) * scale / new
    works = [profile.work(script, exits, kv, cap) for script in scripts]
    decode_s = np.median(scripted[0] / pace, axis=1) * scale
    prefill_s = float(np.median(scripted[1] / pace) * scale)
    cost = fit(works, decode_s, prefill_s)
    return cost, 1000 * per_token, 1000 * cost.time(Work(*done.T)) / new


def predicted(model, trace, cost, found, kv):
    """Milliseconds per new token of every setting, and its mean depth."""
    calibration = state(model).calibration
    assert calibration is not None
    curves = calibration.maps[calibration.confidence]
    cap = state(model).queue_cap
    traced = search.Traced.of(trace, curves, calibration.confidence, cost, kv, cap)
    columns = [[t if e in exits else search.NEVER for e in traced.exits] for exits, t in found]
    outcome = traced.simulate(np.array(columns).T)
    return 1000 * cost.time(outcome.work) / outcome.tokens, outcome.mean_depth


def compared(model, trace, prompts, kv, tokens, rounds):
    """One KV policy's predictions beside the clock."""
    found = settings(trace.exit_layers)
    cost, real, priced = measured(model, prompts, found, kv, tokens, rounds)
    guess, depth = predicted(model, trace, cost, found, kv)
    ratio, own = guess / real, priced / real
    scaled, own_scaled = ratio / np.median(ratio), own / np.median(own)
    rows = [
        {
            "exits": layers,
            "threshold": threshold,
            "mean_depth": float(depth[i]),
            "predicted_ms": float(guess[i]),
            "priced_ms": float(priced[i]),
            "measured_ms": float(real[i]),
            "error": float(ratio[i] - 1),
            "scaled_error": float(scaled[i] - 1),
            "priced_error": float(own[i] - 1),
            "priced_scaled_error": float(own_scaled[i] - 1),
        }
        for i, (layers, threshold) in enumerate(found)
    ]
    return {
        "cost": asdict(cost),
        "largest_error": float(np.abs(ratio - 1).max()),
        "largest_scaled_error": float(np.abs(scaled - 1).max()),
        "largest_priced_error": float(np.abs(own - 1).max()),
        "largest_priced_scaled_error": float(np.abs(own_scaled - 1).max()),
        "settings": rows,
    }


def main() -> None:
    """Compare and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--kv", choices=("recompute", "propagate"), action="append")
    parser.add_argument("--clock", choices=("wall", "thread"), default="wall")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    if options.clock == "thread":
        time.perf_counter = time.thread_time  # every clock of the library is this one
    model, tokenizer = adaptive_gen.load()
    asked = ordered(prompt_set(None), 0)[-PROMPTS:]
    prompts = inputs(model, tokenizer, asked, options.max_new_tokens)
    trace = collect(model, prompts, state(model).exit_layers, options.max_new_tokens)
    result = {
        "started": time.strftime("%Y-%m-%d %H:%M"),
        **environment(model),
        "clock": options.clock,
        "prompts": PROMPTS,
        "max_new_tokens": options.max_new_tokens,
        "rounds": options.rounds,
        "kv": {
            kv: compared(model, trace, prompts, kv, options.max_new_tokens, options.rounds)
            for kv in options.kv or ("recompute", "propagate")
        },
    }
    options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
