"""What is shown: plain text in a pipe, colour and no harm on a terminal."""

import io
import json
import re

import pytest
from rich.console import Console

from adaptive_gen import ui
from adaptive_gen.report import Audit, Report


def report(new_tokens, mean_depth, decode_s, **fields):
    return Report(
        new_tokens=new_tokens,
        n_layers=4,
        mean_depth=mean_depth,
        layer_speedup=1.0,
        exit_histogram={},
        deep_passes=0,
        caught_up=0,
        prefill_s=0.1,
        decode_s=decode_s,
        **fields,
    )


@pytest.fixture
def terminal(monkeypatch):
    """Everything that a user at a terminal is sent."""
    screen = io.StringIO()
    options = {"force_terminal": True, "color_system": "truecolor", "legacy_windows": False}
    monkeypatch.setattr(ui, "out", Console(file=screen, **options))
    monkeypatch.setattr(ui, "err", Console(file=screen, **options))
    return screen


def test_tokens_are_shaded_by_depth_on_a_terminal(terminal):
    for depth in (0.1, 1.0):
        ui.token("x", depth)
    shallow, deep = re.findall(r"\x1b\[38;2;([\d;]+)mx", terminal.getvalue())
    assert shallow != deep


def test_a_terminal_is_not_sent_the_control_characters_of_a_text(terminal):
    ui.token("a\x1b]0;title\x07\r\n", 1.0)
    assert "\x1b]" not in terminal.getvalue()
    assert "\x07" not in terminal.getvalue() and "\r" not in terminal.getvalue()
    assert "\n" in terminal.getvalue()


def test_a_pipe_is_sent_the_text_as_it_is(capsys):
    for text in ("long " * 60, "[bold]", ":smile:", "\x1b[1m", "\r\n"):
        ui.token(text, 0.5)
        assert capsys.readouterr() == (text, "")


def test_notes_and_footers_go_to_stderr_unwrapped(capsys):
    ui.note("note " * 60)
    ui.footer(report(3, mean_depth=2.0, decode_s=0.2))
    assert capsys.readouterr() == (
        "",
        "note " * 60 + "\n3 tokens · 10 tok/s · depth 2.0/4 · layer_speedup 2.00x\n",
    )


def test_the_footer_says_what_was_confirmed_or_audited(capsys):
    ui.footer(report(9, mean_depth=2.0, decode_s=0.8, drafted=8, accepted=6))
    ui.footer(report(9, mean_depth=2.0, decode_s=0.8, audit=Audit(0.875, 8, 1)), wall_speedup=1.3)
    assert capsys.readouterr().err == (
        "9 tokens · 10 tok/s · lossless: 6 of 8 drafts confirmed\n"
        "9 tokens · 10 tok/s · depth 2.0/4 · wall_speedup 1.30x (calibrated) · "
        "agreement 87.5% of 8 tokens audited\n"
    )


def test_a_table_in_a_pipe_keeps_every_cell(capsys):
    ui.table("title", ("name", "value"), [("x" * 70, "y" * 70), ("[bold]", 1234567), ("z", 0.5)])
    out, err = capsys.readouterr()
    assert "x" * 70 in out and "y" * 70 in out and "[bold]" in out
    assert "1,234,567" in out and "0.500" in out
    assert err == ""


def test_progress_passes_everything_on_and_short_work_is_silent_in_a_pipe(capsys):
    assert list(ui.progress(iter("abc"), "working", total=3)) == ["a", "b", "c"]
    assert capsys.readouterr() == ("", "")


def test_long_work_says_a_line_now_and_then_in_a_pipe(capsys, monkeypatch):
    seconds = iter(range(0, 1000, 12))
    monkeypatch.setattr(ui.time, "monotonic", lambda: next(seconds))
    assert list(ui.progress(iter(range(9)), "working", total=9)) == list(range(9))
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert lines and len(lines) < 4 and re.fullmatch(r"working: \d of 9", lines[0])


def test_progress_shows_a_bar_on_a_terminal(terminal):
    assert list(ui.progress([1, 2], "working")) == [1, 2]
    assert "working" in terminal.getvalue()


def test_a_document_is_one_line_of_json(capsys):
    ui.document({"text": "a\nb", "share": 0.5})
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == [
        {"text": "a\nb", "share": 0.5}
    ]


def test_nothing_decoded_is_no_division_by_zero(capsys):
    ui.footer(report(0, mean_depth=0.0, decode_s=0.0))
    assert "0 tokens" in capsys.readouterr().err
