"""The README.md of an exported checkpoint: what it is, how good it was measured to be, its use."""

import re
from pathlib import Path
from typing import Any

from .calibration import Calibration

# Front matter of the whole model's card that holds for a part of it too.
INHERITED = ("license", "license_name", "license_link", "language")


def write_card(
    folder: Path,
    model: Any,
    layers: int,
    calibration: Calibration | None,
    *,
    with_generate: bool,
) -> None:
    """Write README.md.

    Args:
        folder: the checkpoint.
        model: the whole model it was made from.
        layers: how many of its layers were kept.
        calibration: the whole model's.
        with_generate: whether the checkpoint has its own `generate`.
    """
    n_layers = model.config.get_text_config().num_hidden_layers
    front, body = _card_of(model.name_or_path)
    name = Path(model.name_or_path).name if model.name_or_path else type(model).__name__
    whole = layers == n_layers
    title = f"{name}, with adaptive depth" if whole else f"{name}, its first {layers} layers"
    parts = [f"# {title}", _what(name, layers, n_layers)]
    if not whole:
        parts += [_quality(layers, body, calibration)]
    parts += [_USE if with_generate else _DRAFT]
    if whole and body:
        parts += [f"The card of {name} follows.", body]
    tags = ["adaptive-depth", "layer-exit" if whole else "draft-model"]
    meta = ["library_name: transformers", f"tags: [{', '.join(tags)}]", *front]
    page = "\n".join(["---", *meta, "---", "\n\n".join(parts)])
    (folder / "README.md").write_text(page + "\n", encoding="utf-8")


def _card_of(source: str | None) -> tuple[list[str], str]:
    """The lines of front matter that are inherited, and the text, of a local model's card."""
    try:
        page = (Path(source) / "README.md").read_text(encoding="utf-8") if source else ""
    except (OSError, UnicodeDecodeError):
        return [], ""
    found = re.match(r"---\n(.*?)^---\n", page, re.DOTALL | re.MULTILINE)
    if found is None:
        return [], page.strip()
    # An entry ends where the next line begins in the first column: it may be a list below its name.
    entries = re.split(r"\n(?=\S)(?!-)", found[1].rstrip("\n"))
    kept = [entry for entry in entries if entry.split(":")[0] in INHERITED]
    return kept, page[found.end() :].strip()


def _what(name: str, layers: int, n_layers: int) -> str:
    if layers == n_layers:
        return f"All {n_layers} layers of {name}, exported by adaptive_gen."
    return (
        f"The first {layers} of the {n_layers} layers of {name}, with its final norm, LM head and "
        "tokenizer, exported by adaptive_gen. Its logits are those of that model's exit after "
        f"layer {layers}, bit for bit: that was compared when this was written."
    )


def _quality(layers: int, body: str, calibration: Calibration | None) -> str:
    """What was measured of this exit: the calibration's figure, and the row of the card's table."""
    found = []
    rows = calibration.recipe.get("quality", []) if calibration is not None else []
    for row in rows:
        if row.get("exit_layer") == layers:
            found.append(
                "`calibrate run` measured how often it chooses the token the whole model chooses, "
                f"on the whole model's own texts: {row['agreement']:.3f}."
            )
            break
    if table := _table_row(body, layers):
        found.append(f"The card of the whole model says of it:\n\n{table}")
    if not found:
        found = ["Not measured. `adaptive-train eval` on the whole model measures every exit."]
    return "\n\n".join(["## Quality", *found])


def _table_row(body: str, layers: int) -> str:
    """Header and row of this exit, from a table whose first column is `exit layer`."""
    lines = body.splitlines()
    for start, line in enumerate(lines):
        if not re.match(r"\|\s*exit layer\s*\|", line):
            continue
        for row in lines[start + 2 :]:
            if not row.startswith("|"):
                break
            if re.match(rf"\|\s*{layers}\s*\|", row):
                return "\n".join([line, lines[start + 1], row])
    return ""


_DRAFT = """## Use

A drafter for the whole model, which checks what this one proposes: same text, sooner.

- transformers: `whole.generate(**inputs, assistant_model=this)`
- vLLM: `--speculative-config '{"method": "draft_model", "model": "THIS", ...}'`
- SGLang: `--speculative-algorithm STANDALONE --speculative-draft-model-path THIS`

`docs/export.md` of adaptive_gen says more."""

_USE = """## Use

With the package adaptive_gen installed, plain transformers decodes with few layers for easy tokens:

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("THIS", trust_remote_code=True)
model.generate(**inputs)                  # adaptive=False is transformers' own
```

`transformers serve THIS --trust-remote-code` serves it so. Without `trust_remote_code`, or without
the package, it is an ordinary checkpoint and decodes at full depth."""
