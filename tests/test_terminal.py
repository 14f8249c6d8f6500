from __future__ import annotations

from reproml.pipeline.golden import Comparison
from reproml.terminal import Terminal

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
