"""The README's table of model families, made from the table the tests run over.

`make support-table` (or `python tests/support_table.py`) writes it; a test fails where it is stale.
"""

from collections import defaultdict
from pathlib import Path

import families

import adaptive_gen
from adaptive_gen.settings import state

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- support table: make support-table -->", "<!-- end of support table -->"
PATTERNS = {
    ("full_attention",): "full",
    ("sliding_attention",): "sliding window",
    ("full_attention", "sliding_attention"): "full and sliding, by layer",
}


def table():
    """The table as Markdown; families of one kind share a row."""
    rows = defaultdict(list)
    for family, entry in families.FAMILIES.items():
        if not entry.model_type:
            model = adaptive_gen.wrap(families.make(family))
            pattern = PATTERNS[tuple(state(model).decoder.positions.types)]
            engines = "module"
            if state(model).backend.name != "module":
                engines = "compiled, fused, module"
            rows[pattern, engines, entry.note].append(f"`{family}`")
    lines = ["| family (`model_type`) | attention | back ends | notes |", "|---|---|---|---|"]
    for (pattern, engines, note), names in sorted(rows.items()):
        lines.append(f"| {', '.join(names)} | {pattern} | {engines} | {note} |")
    refused = "; ".join(f"`{name}` ({why})" for name, (_, _, why) in families.REFUSED.items())
    return "\n".join([*lines, "", f"Refused, among others: {refused}."])


def split(page):
    """(before, table, after) of the README."""
    before, rest = page.split(BEGIN)
    found, after = rest.split(END)
    return before, found.strip(), after


if __name__ == "__main__":
    before, _, after = split(README.read_text(encoding="utf-8"))
    README.write_text(f"{before}{BEGIN}\n{table()}\n{END}{after}", encoding="utf-8")
