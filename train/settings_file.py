"""Settings from a YAML file, as if they stood on the command line."""

from dataclasses import fields
from pathlib import Path
from typing import Any

from adaptive_gen.errors import OptionError

from .config import TrainConfig

NAMES = frozenset(f.name for f in fields(TrainConfig))


def read_settings(path: Path) -> dict[str, Any]:
    """The settings of a YAML file, named as the options are, with dashes or underscores.

    Raises:
        OptionError: missing, broken, or a name that is no option.
    """
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise OptionError(f"cannot read --config {path}: {reason}.") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        raise OptionError(f"--config {path}{where} is not YAML.") from None
    if not isinstance(content, dict):
        raise OptionError(f"--config {path} holds no `name: value` lines.")
    settings = {str(name).replace("-", "_"): value for name, value in content.items()}
    unknown = sorted(set(settings) - NAMES)
    if unknown:
        raise OptionError(
            f"--config {path} names {', '.join(unknown)}; known are {', '.join(sorted(NAMES))}."
        )
    for name in ("data", "eval_data"):
        if isinstance(settings.get(name), str):
            settings[name] = [settings[name]]
    layers = settings.get("exit_layers")
    if isinstance(layers, list | int):
        settings["exit_layers"] = ",".join(
            map(str, layers if isinstance(layers, list) else [layers])
        )
    return settings
