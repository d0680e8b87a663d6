"""Data files and data sets -> rows; a broken row is reported by its place and may be skipped."""

import gzip
import importlib
import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from adaptive_gen import ui
from adaptive_gen.errors import DataError

from .rows import Row, Text, to_row

KINDS = (".txt", ".jsonl", ".json", ".txt.gz", ".jsonl.gz", ".json.gz", ".parquet")
SEPARATOR = "<|endoftext|>"
HUB = "hf:"


class BadRows:
    """Counts the rows that were skipped, over all files of a run.

    Args:
        allowed: rows to skip; the next one ends the run.
    """

    def __init__(self, allowed: int = 0):
        self.allowed = allowed
        self.count = 0

    def skip(self, error: DataError) -> None:
        """Report one bad row; raise it if it is one too many."""
        self.count += 1
        if self.count > self.allowed:
            more = f" {self.count} bad rows; --max-bad-rows allows {self.allowed}."
            raise DataError(f"{error}{more if self.allowed else ''}") from None
        ui.note(f"skipped: {error}")


def read_rows(path: Path, bad: BadRows | None = None) -> Iterator[Row]:
    """The rows of one source.

    Args:
        path: `.txt` (documents end with `<|endoftext|>`), `.jsonl` or `.json`, each also `.gz`;
            `.parquet`; the directory of a saved data set; or `hf:NAME[:SPLIT]`, from the hub.
        bad: counts and forgives broken rows; by default the first one is an error.

    Raises:
        DataError: missing, unreadable, empty or broken; names the line.
    """
    bad = bad or BadRows()
    values = _values(path, bad)
    rows = _documents(_text_lines(path)) if values is None else _checked(values, bad)
    empty = True
    for row in rows:
        empty = False
        yield row
    if empty:
        raise DataError(f"{path} holds no rows; give a file with text in it.")


def read_json_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of one source as they stand, each checked as for training.

    Raises:
        DataError: as `read_rows`, and for plain text, which has no fields.
    """
    values = _values(path, BadRows())
    if values is None:
        raise DataError(f"{path} is plain text; give .jsonl, .json, .parquet or a data set.")
    for where, value in values:
        to_row(value, where)
        yield value


def check_kind(path: Path) -> None:
    """Raise `DataError` for a file of a kind that is not read, whatever it holds.

    Any file of characters could be read as plain text; source code or a table would then be learnt
    as if it were prose.
    """
    if str(path).startswith(HUB) or path.is_dir() or path.name.lower().endswith(KINDS):
        return
    raise DataError(
        f"{path} is no kind of data file that is read; give {', '.join(KINDS)}, the directory of "
        "a saved data set, or hf:NAME[:SPLIT]. Rename plain text to .txt."
    )


def _values(path: Path, bad: BadRows) -> Iterator[tuple[str, Any]] | None:
    """(place, value) pairs of a source of objects; None for plain text."""
    check_kind(path)
    if str(path).startswith(HUB) or path.is_dir():
        return _data_set(path)
    name = path.name.lower().removesuffix(".gz")
    if name.endswith(".jsonl"):
        return _json_lines(path, bad)
    if name.endswith(".json"):
        return _json_array(path)
    return _parquet(path) if name.endswith(".parquet") else None


def _checked(values: Iterable[tuple[str, Any]], bad: BadRows) -> Iterator[Row]:
    """(place, value) pairs as rows."""
    for where, value in values:
        try:
            yield to_row(value, where)
        except DataError as error:
            bad.skip(error)


def _text_lines(path: Path) -> Iterator[str]:
    """The lines of a text file, read as they are needed."""
    opener = gzip.open if path.suffix.lower() == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            yield from file
    except FileNotFoundError:
        raise DataError(f"no data file {path}; check the path.") from None
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"cannot read {path}: {reason}.") from None
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 text (byte {error.start}); give .txt, .jsonl or .json, "
            "gzipped or not."
        ) from None


def _documents(lines: Iterable[str]) -> Iterator[Row]:
    held: list[str] = []
    for line in lines:
        *ended, rest = line.split(SEPARATOR)
        for part in ended:
            text = "".join([*held, part]).strip()
            held = []
            if text:
                yield Text(text)
        held.append(rest)
    text = "".join(held).strip()
    if text:
        yield Text(text)


def _json_lines(path: Path, bad: BadRows) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(_text_lines(path), start=1):
        if not line.strip():
            continue
        where = f"{path} line {number}"
        try:
            yield where, json.loads(line)
        except json.JSONDecodeError as error:
            bad.skip(DataError(f"{where} is not JSON: {error.msg} at column {error.colno}."))


def _json_array(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        values = json.loads("".join(_text_lines(path)))
    except json.JSONDecodeError as error:
        raise DataError(f"{path} line {error.lineno} is not JSON: {error.msg}.") from None
    if not isinstance(values, list):
        raise DataError(f"{path} holds one {type(values).__name__}; give a JSON list of objects.")
    for number, value in enumerate(values, start=1):
        yield f"{path} item {number}", value


def _parquet(path: Path) -> Iterator[tuple[str, Any]]:
    parquet = _extra("pyarrow.parquet", path)
    try:
        with parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=1000):
                for value in batch.to_pylist():
                    number += 1
                    yield f"{path} row {number}", value
    except FileNotFoundError:
        raise DataError(f"no data file {path}; check the path.") from None
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {path}: {_first_line(error)}") from None


def _data_set(path: Path) -> Iterator[tuple[str, Any]]:
    """A data set of the `datasets` library: saved in a directory, or on the hub."""
    datasets = _extra("datasets", path)
    try:
        if path.is_dir():
            found = datasets.load_from_disk(str(path))
        else:
            name, _, split = str(path).removeprefix(HUB).partition(":")
            found = datasets.load_dataset(name, split=split or "train")
    except Exception as error:  # the hub, its cache and its builders raise their own kinds
        raise DataError(f"cannot load the data set {path}: {_first_line(error)}") from None
    if isinstance(found, dict):
        raise DataError(
            f"{path} holds the splits {', '.join(found)}; give the directory of one of them."
        )
    for number, value in enumerate(found, start=1):
        yield f"{path} row {number}", value


def _extra(module: str, path: Path) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise DataError(
            f"{path} needs {module.split('.')[0]}; `pip install adaptive-gen[data]` has it."
        ) from None


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(".") + "."
