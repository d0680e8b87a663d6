"""A trained model on disk, whole or not at all, with a record of how it came about."""

import importlib.metadata
import json
import os
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from adaptive_gen.errors import ModelError

from .config import TrainConfig
from .objectives import Objective

RECORD = "training.json"


def record(config: TrainConfig, method: str, objective: Objective, trainer: Any) -> dict[str, Any]:
    """What a run did: its settings, its size and its speed, as plain values."""
    settings = json.loads(json.dumps(asdict(config), default=str))
    return {
        "method": method,
        "objective": str(objective),
        "exit_layers": list(trainer.exit_layers),
        "parameters": trainer.parameters,
        "trained_parameters": trainer.trained_parameters,
        "steps": trainer.state.global_step,
        **trainer.throughput.as_dict(),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers")},
        "settings": settings,
    }


def settings_of(folder: Path) -> dict[str, Any]:
    """The settings a model was trained with; empty where no run left its record.

    Raises:
        ModelError: the record is broken.
    """
    path = folder / RECORD
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError):
        raise ModelError(
            f"{path} is no readable record of a training run; move it away, or restore it."
        ) from None
    # Others write files of this name, too.
    settings = found.get("settings") if isinstance(found, dict) else None
    return settings if isinstance(settings, dict) else {}


def save(
    model: Any,
    tokenizer: Any,
    out: Path,
    notes: dict[str, Any],
    weights: dict[str, Any] | None = None,
) -> None:
    """Save beside the target and move file by file: a reader never sees half a model.

    Args:
        model: readouts of its exits' own, if it has any, go into a file of their own.
        tokenizer: of the model.
        out: the directory, made if need be.
        notes: the record of the run.
        weights: the state dict, where the model's parameters are shards; None takes the model's.
    """
    from adaptive_gen import exit_readouts

    out.mkdir(parents=True, exist_ok=True)
    model.config.use_cache = True  # the Trainer turned it off
    with tempfile.TemporaryDirectory(dir=out, prefix=".saving-") as name:
        folder = Path(name)
        exit_readouts.save_readouts(model, folder)
        if hasattr(model, exit_readouts.NAME):
            delattr(model, exit_readouts.NAME)
        model.save_pretrained(folder, state_dict=weights)
        tokenizer.save_pretrained(folder)
        write_json(folder / RECORD, notes)
        # The record goes last: where it lies, all of the model does.
        for file in sorted(folder.iterdir(), key=lambda path: path.name == RECORD):
            file.chmod(0o644)  # safetensors writes for its owner alone
            os.replace(file, out / file.name)


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file, whole or not at all."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_text(path: Path, content: str) -> None:
    """Write a text file, whole or not at all."""
    new = path.with_name(f".{path.name}.new")
    new.write_text(content, encoding="utf-8")
    os.replace(new, path)
