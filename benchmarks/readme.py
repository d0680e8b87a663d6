"""Write the README's tables from results files, each between the two comments that mark its place.

python -m benchmarks.readme                                     # with the files it names already
python -m benchmarks.readme benchmarks/results/NAME.json        # the first table from this one
"""

import argparse
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adaptive_gen import bench

ROOT = Path(__file__).parents[1]
PLACE = re.compile(r"<!-- results: (\S*) -->\n(.*?)<!-- end of results -->\n", re.DOTALL)
MACHINES = re.compile(r"<!-- machines -->\n(.*?)<!-- end of machines -->\n", re.DOTALL)
RESULTS = "benchmarks/results"
# Model, its track, processor, results file: what the table of machines shows.
MEASURED = (
    ("builtin", "end_to_end", "Zen 5", "2026-11-29-amd-epyc-2core-3"),
    ("builtin", "end_to_end", "Zen 4", "2026-11-29-amd-epyc-zen4-2core-6"),
    ("builtin", "end_to_end", "Zen 3", "2026-11-30-amd-epyc-znver3-2core-5"),
    ("builtin", "end_to_end", "Xeon", "2026-11-29-intel-r-xeon-r-processor-2core-7"),
    ("builtin", "end_to_end", "Emerald Rapids", "2026-12-01-emerald-rapids-2core-builtin"),
    ("24x512", "mechanism", "Zen 4", "2026-11-29-amd-epyc-zen4-2core-8"),
    ("24x512", "mechanism", "Zen 3", "2026-11-30-amd-epyc-znver3-2core"),
    ("24x512", "mechanism", "Emerald Rapids", "2026-12-01-emerald-rapids-2core"),
    ("Llama-3.2-1B", "mechanism", "Zen 5", "2026-11-29-amd-epyc-2core-llama-1b"),
    ("Llama-3.2-1B", "mechanism", "Zen 4", "2026-11-29-amd-epyc-zen4-2core-llama-1b"),
    ("Llama-3.2-1B", "mechanism", "Zen 3", "2026-11-30-amd-epyc-znver3-2core-llama-1b"),
    ("Gemma-3-270M", "mechanism", "Zen 4", "2026-11-29-amd-epyc-zen4-2core-gemma-3-270m"),
    ("Gemma-3-1B", "mechanism", "Zen 4", "2026-11-29-amd-epyc-zen4-2core-gemma-3-1b"),
    ("OLMo-2-1B", "mechanism", "Zen 4", "2026-11-29-amd-epyc-zen4-2core-olmo-2-1b"),
    ("GPT-2", "mechanism", "Zen 3", "2026-11-30-amd-epyc-znver3-2core-gpt-2"),
    ("Pythia-410M", "mechanism", "Zen 3", "2026-11-30-amd-epyc-znver3-2core-pythia-410m"),
    (
        "Granite-MoE-1B",
        "mechanism",
        "Emerald Rapids",
        "2026-12-01-emerald-rapids-2core-granite-moe-1b",
    ),
)
# Its columns: the arms of one track, and of the other.
COLUMNS = {
    "transformers": ("transformers", "transformers"),
    "full depth": ("full_depth", "full_depth"),
    "exits": ("adaptive", "gate_0.25_recompute"),
    "lossless": ("lossless", "lossless"),
    "int8": ("int8_full_depth", "int8_full_depth"),
    "int8, exits": ("int8_adaptive", "int8_exit"),
}
ROWS = (
    "transformers",
    "transformers_static",
    "transformers_compiled",
    "transformers_early_exit",
    "transformers_prompt_lookup",
    "full_depth",
    "adaptive",
    "lossless",
    "int8_full_depth",
    "int8_adaptive",
)


def main() -> None:
    """Rewrite README.md in place."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.readme", description=__doc__)
    parser.add_argument("results", type=Path, nargs="?")
    given = parser.parse_args().results
    page = ROOT / "README.md"
    text = page.read_text(encoding="utf-8")
    name = given.resolve().relative_to(ROOT).as_posix() if given else _named(text)
    text, places = MACHINES.subn(lambda _: _machines_block(), rewritten(text, name))
    if places != 1:
        raise SystemExit(f"README.md has {places} places for the table of machines; it needs one.")
    partial = page.with_name(".README.md")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, page)


def rewritten(page: str, name: str) -> str:
    """The page with the table of the results file `name`, a path in the repository."""
    document = json.loads((ROOT / name).read_text(encoding="utf-8"))
    block = f"<!-- results: {name} -->\n{table(document, name)}<!-- end of results -->\n"
    changed, places = PLACE.subn(lambda _: block, page)
    if places != 1:
        raise SystemExit(
            f"README.md has {places} places for results; it needs one, from '<!-- results: -->' "
            "to '<!-- end of results -->'."
        )
    return changed


def _named(page: str) -> str:
    """The file that the first table is from."""
    place = PLACE.search(page)
    if place is None or not place[1]:
        raise SystemExit("README.md names no results file yet; give one.")
    return place[1]


def machines() -> str:
    """Markdown: tokens per second of models and shapes on every kind of processor."""
    lines = [
        f"| | processor | {' | '.join(COLUMNS)} | commit |",
        f"|---|---|{'---|' * len(COLUMNS)}---|",
    ]
    shown = ""
    for model, track, processor, stem in MEASURED:
        name = f"{RESULTS}/{stem}.json"
        document = json.loads((ROOT / name).read_text(encoding="utf-8"))
        found, recipe = document[track], document["recipe"]
        if track == "mechanism":
            (found,) = (each for each in found if each["model"] == model)
        arms = [found["arms"][names[track == "mechanism"]] for names in COLUMNS.values()]
        speeds = [arm["tokens_per_s"] for arm in arms]
        cells = [f"{speed:,.0f}" if speed >= 200 else f"{speed:.1f}" for speed in speeds]
        first = "" if model == shown else model
        where = f"{processor}, {bench.threads(recipe)}"
        lines.append(f"| {first} | {where} | {' | '.join(cells)} | [{recipe['commit']}]({name}) |")
        shown = model
    return "\n".join(lines) + "\n"


def _machines_block() -> str:
    return f"<!-- machines -->\n{machines()}<!-- end of machines -->\n"


def table(document: Mapping[str, Any], name: str) -> str:
    """Markdown: what every arm did, what was gained, where and how it was measured."""
    if "end_to_end" not in document:
        raise SystemExit(f"{name} has no end-to-end track; run it with --track end_to_end.")
    found, recipe = document["end_to_end"], document["recipe"]
    arms = found["arms"]
    lines = ["| | tok/s | mean_depth | agreement with full depth |", "|---|---|---|---|"]
    for key in (*ROWS, found["static_truncation"]):
        if key in arms:
            arm = arms[key]
            depth = f"{arm.get('mean_depth', _depth(key, found)):.3g}"
            lines.append(
                f"| {arm['label']} | {arm['tokens_per_s']:.0f} | {depth} | {arm['agreement']:.3f} |"
            )
    adaptive = arms["adaptive"]
    over = adaptive["tokens_per_s"] / arms["transformers"]["tokens_per_s"]
    interval = adaptive["wall_speedup_interval"]
    within = f" (95 % interval {interval[0]:.2f} to {interval[1]:.2f})" if interval else ""
    versions = recipe["versions"]
    lines += [
        "",
        f"`wall_speedup` {adaptive['wall_speedup']:.2f}x over our own full depth{within}, "
        f"{over:.2f}x over transformers' `generate`. {found['model']}: "
        f"{found['parameters'] / 1e6:.1f} M parameters, {found['n_layers']} layers; "
        f"{recipe['hardware']}, {bench.threads(recipe)}, "
        f"{recipe['dtype']}, torch {versions['torch']}, transformers {versions['transformers']}; "
        f"whole calls, {found['prompts']} prompts that calibration did not see "
        f"([results]({name}), commit {recipe['commit']}):",
        "",
        "```",
        recipe["command"],
        "```",
    ]
    return "\n".join(lines) + "\n"


def _depth(arm: str, found: Mapping[str, Any]) -> float:
    """Layers per token of an arm that has one depth; drafting peers verify at full depth."""
    return float(arm.removeprefix("cut_") if arm.startswith("cut_") else found["n_layers"])


if __name__ == "__main__":
    main()
