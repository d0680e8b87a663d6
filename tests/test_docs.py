"""The documents' Python runs as it stands, block after block."""

import dataclasses
import re
from pathlib import Path

from adaptive_gen.report import Report
from adaptive_gen.settings import FIELDS

DOCS = Path(__file__).parents[1] / "docs"


def test_the_examples_of_modes_run(monkeypatch):
    page = (DOCS / "modes.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 5
    names = {}
    for block in blocks:
        exec(compile(block, "docs/modes.md", "exec"), names)
        out = names["out"]
        assert out.report.new_tokens > 0
        if "lossless" in block:
            assert out.report.drafted >= out.report.accepted > 0
        if "audit_floor" in block:
            assert out.report.audit.floor == 0.97


def test_the_table_of_our_keywords_has_all_of_them_and_the_report_is_described():
    ours = (DOCS / "generate.md").read_text().split("## Ours")[1].split("## ")[0]
    assert set(re.findall(r"^\| `(\w+)` ", ours, re.MULTILINE)) == set(FIELDS)
    told = set(re.findall(r"`(\w+)`", ours.split("`report`: ")[1]))
    assert told == {field.name for field in dataclasses.fields(Report)}


def test_no_figure_is_still_to_be_filled_in():
    for page in (*DOCS.glob("*.md"), DOCS.parent / "README.md"):
        assert not re.search(r"@[A-Z]+@", page.read_text()), page.name
