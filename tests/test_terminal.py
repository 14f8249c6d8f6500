from __future__ import annotations

import io
import sys

import pytest

from reproml.pipeline.golden import Comparison
from reproml.terminal import Terminal, complain, printable

GOOD, BAD = Comparison("a.sha256", "0" * 64, "0" * 64), Comparison("b.count", "12", "13")


def test_redirected_output_is_plain_lines(capsys):
    terminal = Terminal()
    terminal.print("x" * 300)
    terminal.print("[bold] is not markup")
    with terminal.bar("train") as progress:
        progress(1, 2)
    terminal.table([BAD, GOOD])
    assert capsys.readouterr().out.splitlines() == [
        "x" * 300,
        "[bold] is not markup",
        "DIFFERS  b.count  expected 12, found 13",
        f"ok       a.sha256  {'0' * 64}",
    ]


def test_terminal_shows_bar_and_table(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes this for a terminal
    monkeypatch.setenv("COLUMNS", "80")
    terminal = Terminal()
    with terminal.bar("train") as progress:
        progress(1, 2)
    assert "train" in capsys.readouterr().out
    terminal.table([BAD, GOOD])
    shown = capsys.readouterr().out
    assert "expected 12" in shown and "found    13" in shown
    assert "0" * 16 + "..." in shown and "0" * 17 not in shown


def test_json_moves_lines_to_standard_error(capsys):
    Terminal(to_stderr=True).print("hello")
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "hello\n")


HOSTILE = "zz\x1b[2K\x1b[1G\rok \x9b1A\u202e\n\u2028\udcff"
SHOWN = r"zz\x1b[2K\x1b[1G\rok \x9b1A\u202e\n\u2028\udcff"


def test_printable_shows_control_characters_as_text():
    assert printable(HOSTILE) == SHOWN and printable(SHOWN) == SHOWN
    assert printable("äß 漢 ▁█ é") == "äß 漢 ▁█ é"
    assert printable("ä▁", "latin-1") == r"ä\u2581"


def test_control_characters_are_shown_everywhere(capsys, monkeypatch):
    Terminal().print(HOSTILE + " :smile:")  # no code of an emoji is replaced either
    complain(HOSTILE)
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == (f"{SHOWN} :smile:\n", f"reproml: {SHOWN}\n")
    rows = [Comparison(HOSTILE, HOSTILE, "\x1b"), Comparison(HOSTILE, HOSTILE, HOSTILE)]
    Terminal().table(rows)
    assert "\x1b" not in capsys.readouterr().out
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "300")
    Terminal().table(rows)
    shown = capsys.readouterr().out
    assert shown.count(SHOWN) == 4 and "\x1b[2K" not in shown


def test_ascii_terminal_gets_escapes(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", stream)
    Terminal().print("▁ é")
    Terminal().table([GOOD])
    complain("é")
    stream.flush()
    assert stream.buffer.getvalue().decode("ascii").splitlines()[0] == r"\u2581 \xe9"


def test_closed_pipe_raises(monkeypatch):
    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stdout", Closed())
    with pytest.raises(BrokenPipeError):
        Terminal().print("x")
