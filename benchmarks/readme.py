"""Write the README's table from a results file, between the two comments that mark its place.

python -m benchmarks.readme benchmarks/results/NAME.json
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
ROWS = (
    "transformers",
    "transformers_static",
    "transformers_compiled",
    "transformers_early_exit",
    "transformers_prompt_lookup",
    "full_depth",
    "adaptive",
    "lossless",
)


def main() -> None:
    """Rewrite README.md in place."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.readme", description=__doc__)
    parser.add_argument("results", type=Path)
    path = parser.parse_args().results.resolve()
    page = ROOT / "README.md"
    text = rewritten(page.read_text(encoding="utf-8"), path.relative_to(ROOT).as_posix())
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
