"""The documents' Python runs as it stands, block after block."""

import re
from pathlib import Path

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
