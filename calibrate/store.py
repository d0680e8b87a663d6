"""Where the stages of a calibration keep what they found, so that none has to be done twice.

A directory of one calibration: `job.json` says of what, `traces-*.npz` are the collected shards,
`cost.json` the timing, `search.json`, `replay.json` and `certify.json` what the later stages found.
Every file is written whole or not at all.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from adaptive_gen.errors import CalibrationError
from adaptive_gen.files import make_directory, whole

JOB = "job"


def default_home() -> Path:
    """Where calibrations in progress lie when no --work is given: the user's cache."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "adaptive_gen" / "calibrate"


class Store:
    """One calibration's directory."""

    def __init__(self, directory: Path, job: dict[str, Any] | None = None):
        """Open it, or make it.

        Args:
            directory: where.
            job: what is calibrated; None takes what lies there.

        Raises:
            CalibrationError: it holds another calibration, or none when `job` is None.
            OutputError: it cannot be made.
        """
        self.directory = directory
        if job is None:
            self.job = self.read(JOB, "collect")
            return
        self.job = json.loads(json.dumps(job))
        if self.path(JOB).exists() and self.read(JOB, "collect") != self.job:
            raise CalibrationError(
                f"{directory} holds a calibration of another model, other prompts or other "
                "settings. Name another directory with --work, or delete that one."
            )
        make_directory(directory, "--work")
        self.write(JOB, self.job)

    def path(self, name: str) -> Path:
        """Of one document."""
        return self.directory / f"{name}.json"

    def read(self, name: str, stage: str) -> Any:
        """One document, which `stage` makes.

        Raises:
            CalibrationError: the stage has not been run, or its file is broken.
        """
        try:
            return json.loads(self.path(name).read_text())
        except FileNotFoundError:
            raise CalibrationError(
                f"{self.directory} holds no {name}.json; run `calibrate {stage}` first."
            ) from None
        except (OSError, ValueError):
            raise CalibrationError(
                f"{self.path(name)} cannot be read; run `calibrate {stage}` again."
            ) from None

    def write(self, name: str, document: Any) -> None:
        """Keep one document."""
        with whole(self.path(name), "--work") as file:
            json.dump(document, file)


def key(job: dict[str, Any]) -> str:
    """A short name for a job, the same for equal ones."""
    return hashlib.sha256(json.dumps(job, sort_keys=True).encode()).hexdigest()[:16]
