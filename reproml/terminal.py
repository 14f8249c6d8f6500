"""What a person sees: a progress bar and a table on a terminal, plain lines when redirected."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Callable

if TYPE_CHECKING:
    from reproml.pipeline.golden import Comparison


class Terminal:
    """Standard output, or standard error where standard output is kept for JSON."""

    def __init__(self, to_stderr: bool = False) -> None:
        from rich.console import Console

        self._console = Console(stderr=to_stderr)

    def say(self, line: str) -> None:
        """Print a line as it is: no markup, no wrapping."""
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    @contextmanager
    def bar(self, what: str) -> Iterator[Callable[[int, int], None]]:
        """Yield the function that takes (done, total) and shows a bar from its first call on.

        Not earlier: what the block does first, a download say, may show a bar of its own.
        """
        from rich.progress import Progress

        hidden = not self._console.is_terminal
        progress = Progress(console=self._console, disable=hidden, transient=True)
        task = progress.add_task(what)

        def update(done: int, total: int) -> None:
            progress.start()
            progress.update(task, completed=done, total=total)

        try:
            yield update
        finally:
            progress.stop()

    def table(self, comparisons: list[Comparison]) -> None:
        """Show each item with its value, or with both values where they differ."""
        if not self._console.is_terminal:
            for c in comparisons:
                label = "ok     " if c.match else "DIFFERS"
                values = c.found if c.match else f"expected {c.expected}, found {c.found}"
                self.say(f"{label}  {c.item}  {values}")
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
    """Cut a hash that needs no reading, so that a row fits a line of 80 columns."""
    return value if len(value) < 64 else f"{value[:16]}..."
