"""Output for people: a progress bar and a table on a terminal, plain lines when redirected."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Callable

if TYPE_CHECKING:
    from reproml.pipeline.golden import Comparison


class Terminal:
    """Prints to standard output, or to standard error where standard output is reserved for JSON."""

    def __init__(self, to_stderr: bool = False) -> None:
        from rich.console import Console

        self._console = Console(stderr=to_stderr)

    def print(self, line: str) -> None:
        """Print a line verbatim: no markup, no wrapping."""
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

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
            values = _short(c.found) if c.match else f"expected {c.expected}\nfound    {c.found}"
            table.add_row(mark, Text(c.item, overflow="fold"), Text(values, overflow="fold"))
        self._console.print(table)


def _short(value: str) -> str:
    """Shorten a hash, so that a row fits a line of 80 columns."""
    return value if len(value) < 64 else f"{value[:16]}..."
