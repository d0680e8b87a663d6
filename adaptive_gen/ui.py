"""Everything the commands show: the only module that prints, and the only importer of rich.

The answer goes to stdout; notes, progress and footers go to stderr. Colour, bars and prompts
appear only on a terminal: what a pipe receives is the plain text and nothing else. Where stderr is
no terminal, long work says a line from time to time in place of its bar.
"""

import json
import math
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from .report import Report

Item = TypeVar("Item")

out = Console(highlight=False, markup=False, emoji=False)
err = Console(stderr=True, highlight=False, markup=False, emoji=False)

# From shallow to deep, cool to warm: readable on light and dark, distinct with 16 colours too.
SHADES = ("#00a0a8", "#2f9e44", "#b58900", "#d9631e", "#d2323c")
# A model may have learned terminal escape sequences; on a terminal they are not carried out.
CONTROL = {code: None for code in [*range(32), 127, *range(128, 160)] if chr(code) not in "\n\t"}
PIPE_WIDTH = 160
SILENCE_S = 30.0  # longest silence of work without a bar, as far as its steps are shorter


def note(text: str) -> None:
    """One line for the user, on stderr."""
    err.print(text, soft_wrap=True)


def text(content: str, end: str = "\n") -> None:
    """A piece of the answer, on stdout, as it is."""
    out.print(Text(content), end=end, soft_wrap=True)


def document(content: Any) -> None:
    """One JSON document on one line of stdout, the last line of a command's output."""
    sys.stdout.write(json.dumps(content) + "\n")
    sys.stdout.flush()


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """A table on stdout: the first column is left-aligned, the others, being numbers, right."""
    out.print(Text(title, style="bold"), soft_wrap=True)
    grid = Table(box=None, pad_edge=False, show_header=any(columns))
    for index, column in enumerate(columns):
        grid.add_column(column, justify="left" if index == 0 else "right", overflow="fold")
    for row in rows:
        grid.add_row(*(Text(_cell(value)) for value in row))
    # Without a terminal rich would fold the cells at 80 columns.
    console = out if out.is_terminal else Console(width=PIPE_WIDTH, markup=False, emoji=False)
    console.print(grid)


def _cell(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return "yes" if value else "-"
    if isinstance(value, float):
        return f"{value:.3f}"
    if isinstance(value, list | tuple):
        return ",".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) else str(value)


class Pulse:
    """Says that work goes on where nothing else has been said for `SILENCE_S` seconds."""

    def __init__(self):
        """Start to count the seconds."""
        self.rest()

    def rest(self) -> None:
        """Something else was said."""
        self._last = time.monotonic()

    def beat(self, text: str) -> None:
        """Say it if it is time to."""
        if time.monotonic() - self._last >= SILENCE_S:
            note(text)
            self.rest()


def progress(
    iterable: Iterable[Item], description: str, total: int | None = None
) -> Iterator[Item]:
    """Pass `iterable` on, with a bar on stderr while it lasts; without a terminal, a `Pulse`."""
    if not err.is_terminal:
        pulse, of = Pulse(), "" if total is None else f" of {total}"
        for done, item in enumerate(iterable):
            pulse.beat(f"{description}: {done}{of}")
            yield item
        return
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    with Progress(*columns, TimeRemainingColumn(), console=err, transient=True) as bar:
        yield from bar.track(iterable, total=total, description=description)


def token(content: str, depth: float) -> None:
    """One generated piece of text, shaded by how deep it ran.

    Args:
        content: the text; it may hold line breaks, or be empty.
        depth: share of the layers that ran, in (0, 1].
    """
    if not out.is_terminal:
        sys.stdout.write(content)
        sys.stdout.flush()
        return
    out.print(Text(content.translate(CONTROL), style=shade(depth)), end="", soft_wrap=True)


def shade(depth: float) -> str:
    """The colour of a depth in (0, 1]."""
    return SHADES[min(len(SHADES) - 1, max(0, math.ceil(depth * len(SHADES)) - 1))]


def footer(report: "Report", wall_speedup: float | None = None) -> None:
    """What one reply cost, on stderr.

    Args:
        report: of the reply.
        wall_speedup: the speed-up measured by the calibration in use; without one the footer
            names the layers saved, which is not a speed-up in time, or what was confirmed.
    """
    mean_depth, n_layers = report.mean_depth, report.n_layers
    parts = [f"{report.new_tokens} tokens", f"{report.tokens_per_s:.0f} tok/s"]
    if report.drafted:
        # A confirmed draft has run through all layers as well: its depth is not what it cost.
        parts.append(f"lossless: {report.accepted} of {report.drafted} drafts confirmed")
    else:
        parts.append(f"depth {mean_depth:.1f}/{n_layers}")
        if wall_speedup is not None:
            parts.append(f"wall_speedup {wall_speedup:.2f}x (calibrated)")
        elif report.new_tokens:
            parts.append(f"layer_speedup {n_layers / mean_depth:.2f}x")
        else:
            parts.append("layer_speedup -")
    if report.audit is not None:
        audit = report.audit
        agreement = f"{audit.agreement:.1%}" if audit.tokens else "-"
        parts.append(f"agreement {agreement} of {audit.tokens} tokens audited")
    if report.unchecked:
        parts.append(report.unchecked)
    err.print(Text(" · ".join(parts), style="dim"), soft_wrap=True)


def lines(prompt: str = "> ") -> Iterator[str]:
    """What the user types, line by line, until Ctrl-D; or the lines of a pipe.

    Ctrl-C at the prompt drops the line and asks again.
    """
    if not sys.stdin.isatty():
        for line in sys.stdin:
            yield line.rstrip("\n")
        return
    try:
        import readline  # noqa: F401 -- line editing and history, where Python has it
    except ImportError:
        pass
    while True:
        try:
            if sys.stdout.isatty():
                yield input(prompt)
            else:
                # The answer goes to a file: the prompt must not.
                err.print(prompt, end="")
                yield input()
        except KeyboardInterrupt:
            note("\nCtrl-D ends the chat.")
        except EOFError:
            note("")
            return
