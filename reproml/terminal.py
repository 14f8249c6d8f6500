"""Output for people: a progress bar and a table on a terminal, plain lines when redirected.

Everything that is printed passes `printable`, because names and values come from files: a control character
could move the cursor and write another verdict over the right one.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Callable, Optional

if TYPE_CHECKING:
    from reproml.pipeline.golden import Comparison


def printable(text: str, encoding: Optional[str] = None) -> str:
    r"""Return the text as one line: what a terminal would obey or not show is an escape such as \x1b."""
    if not text.isprintable():
        text = "".join(c if c.isprintable() else _escape(c) for c in text)
    return text.encode(encoding or "utf-8", "backslashreplace").decode(encoding or "utf-8")


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode()


def complain(message: Any) -> None:
    """Print one line about something that went wrong to standard error."""
    print(f"reproml: {printable(str(message), sys.stderr.encoding)}", file=sys.stderr)


class Terminal:
    """Prints to standard output, or to standard error where standard output is reserved for JSON."""

    def __init__(self, to_stderr: bool = False) -> None:
        from rich.console import Console

        class PlainConsole(Console):
            def on_broken_pipe(self) -> None:
                raise  # the BrokenPipeError, for which rich exits with 1, the status of a mismatch

        self._console = PlainConsole(stderr=to_stderr)

    def print(self, line: str) -> None:
        """Print a line verbatim: no markup, no wrapping, no control characters."""
        self._console.out(self._printable(line), highlight=False)

    def _printable(self, text: str) -> str:
        return printable(text, self._console.encoding)

    @contextmanager
    def bar(self, name: str) -> Iterator[Callable[[int, int], None]]:
        """Yield a function of (done, total) that updates a progress bar.

        The bar appears at the first call, because the block may show another one before, of a download.
        """
        from rich.progress import Progress

        hidden = not self._console.is_terminal
        progress = Progress(console=self._console, disable=hidden, transient=True)
        task = progress.add_task(name)

        def update(done: int, total: int) -> None:
            progress.start()
            progress.update(task, completed=done, total=total)

        try:
            yield update
        finally:
            progress.stop()

    def table(self, comparisons: list[Comparison]) -> None:
        """Print each item with its value, or with both values where they differ."""
        if not self._console.is_terminal:
            for c in comparisons:
                label = "ok     " if c.match else "DIFFERS"
                values = c.found if c.match else f"expected {c.expected}, found {c.found}"
                self.print(f"{label}  {c.item}  {values}")
            return
        from rich.table import Table
        from rich.text import Text

        table = Table("", "item", "value")
        for c in comparisons:
            mark = Text("ok", "green") if c.match else Text("differs", "bold red")
            item, expected, found = map(self._printable, (c.item, c.expected, c.found))
            values = _short(found) if c.match else f"expected {expected}\nfound    {found}"
            table.add_row(mark, Text(item, overflow="fold"), Text(values, overflow="fold"))
        self._console.print(table)


def _short(value: str) -> str:
    """Shorten a hash, so that a row fits a line of 80 columns."""
    return value if len(value) < 64 else f"{value[:16]}..."
