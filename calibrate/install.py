"""Where a finished calibration goes: into the model directory, unless it slows the model down."""

from pathlib import Path
from typing import NoReturn

from adaptive_gen import calibration as artefact
from adaptive_gen import ui
from adaptive_gen.errors import OutputError, Unreachable
from adaptive_gen.files import make_directory, whole

from . import tables
from .worth import Slower

REFUSED = "calibration-slower"  # a directory that `load` does not look into


def write(found: artefact.Calibration, directory: Path, work: Path) -> None:
    """Write a calibration and its evidence into the model directory.

    Raises:
        OutputError: it cannot be written; what was found is still in `work`.
    """
    try:
        make_directory(directory, "--out")
        with whole(directory / tables.EVIDENCE, "--out", "wb") as file:
            file.write((work / "evidence.json").read_bytes())
        if found.confidence == "gate":
            from adaptive_gen.gate import Gate

            Gate.load(work).save(directory)
        path = artefact.save(found, directory)
    except OutputError:
        ui.note(f"the finished calibration.json is in {work}, with its evidence.json")
        raise
    ui.note(f"written to {path}; `calibrate report {directory}` makes a page of it")


def refuse(error: Slower, directory: Path, work: Path, as_json: bool) -> NoReturn:
    """Keep the figures of a calibration that slows the model down beside it, and fail.

    Whatever calibration the model directory holds stays as it is.

    Raises:
        Unreachable: always, with what to do.
        OutputError: the figures cannot be written.
    """
    kept = directory / REFUSED
    write(error.calibration, kept, work)
    tables.show(error.calibration, as_json)
    raise Unreachable(
        f"{error} It is not installed in {directory}; to use it all the same give --calibration "
        f"{kept / artefact.FILE_NAME}."
    ) from None
