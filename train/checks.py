"""What can be wrong with a run, found before anything is loaded or trained."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

from adaptive_gen.errors import DataError, OptionError, OutputError

from .config import TrainConfig
from .reading import HUB, check_kind

CHECKPOINTS = "checkpoints"


def check_data(paths: Sequence[Path]) -> None:
    """Raise `DataError` unless there is data and all files of it exist and are of a known kind."""
    if not paths:
        raise DataError("no data: give --data FILE (MODEL comes before --data).")
    for path in paths:
        if not path.exists() and not str(path).startswith(HUB):
            raise DataError(f"no data file {path}; check the path.")
        check_kind(path)


def check_length(config: TrainConfig) -> None:
    """Raise `OptionError` for a run without a step: what it wrote would look like a trained model.

    `max_steps` is -1 where the epochs say how long it lasts.
    """
    if config.max_steps == 0 or config.max_steps < -1:
        raise OptionError(
            f"--max-steps {config.max_steps} trains nothing; give 1 or more, or leave it out to "
            "train for --epochs."
        )
    if config.max_steps < 0 and config.epochs <= 0:
        raise OptionError(
            f"--epochs {config.epochs:g} trains nothing; give more than 0, or --max-steps."
        )


def check_writable(directory: Path) -> None:
    """Raise `OutputError` unless files can be made in `directory`, which may not exist yet."""
    probe = directory
    while not probe.exists() and probe != probe.parent:
        probe = probe.parent
    try:
        if not probe.is_dir():
            raise NotADirectoryError(20, f"{probe} is a file")
        with tempfile.TemporaryFile(dir=probe):
            pass
    except OSError as error:
        raise OutputError(
            f"cannot write to {directory}: {error.strerror}; choose another --out."
        ) from None


def checkpoint_to_resume(out: Path, resume: bool) -> Path | None:
    """The last checkpoint of the run in `out` that was written to its end; None for a new run.

    Raises:
        OptionError: nothing to resume, or a new run would mix with an old one's checkpoints.
    """
    from transformers.trainer_callback import TrainerState

    folder = out / CHECKPOINTS
    whole = {}
    for found in folder.glob("checkpoint-*/trainer_state.json"):  # the Trainer writes it last
        try:
            whole[TrainerState.load_from_json(str(found)).global_step] = found.parent
        except (ValueError, TypeError):
            continue
    if resume and not whole:
        raise OptionError(f"nothing to resume: {folder} has no checkpoint; leave --resume away.")
    if whole and not resume:
        raise OptionError(
            f"{folder} has another run's checkpoints: add --resume to go on, "
            "or choose another --out."
        )
    return whole[max(whole)] if whole else None
