"""Where the commands write: rich on a terminal, plain lines in a pipe."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich import box
from rich.console import Console as RichConsole
from rich.table import Table
from rich.text import Text

PIPE_SECONDS_PER_LINE = 10.0


class Console(RichConsole):
    """A rich console whose tables and progress bars turn into plain, unwrapped text where nobody watches.

    Args:
        quiet: print nothing but `error`.
        stderr: write to stderr, for a command whose stdout carries JSON.
    """

    def __init__(self, *, quiet: bool = False, stderr: bool = False) -> None:
        super().__init__(quiet=quiet, stderr=stderr, highlight=False)
        if not self.is_terminal:
            self.soft_wrap = True  # a pipe has no width: a wrapped line would break grep

    def error(self, message: str) -> None:
        """One line on stderr, also when quiet."""
        RichConsole(stderr=True, highlight=False, soft_wrap=True).print(Text(f"limber-fast: {message}", style="red"))

    def table(self, title: str, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Prints rows under a header, which may be empty; in a pipe as aligned columns two spaces apart."""
        cells = [[str(cell) for cell in row] for row in rows]
        if self.is_terminal:
            table = Table(*header, title=title, title_justify="left", box=box.SIMPLE, show_header=bool(header))
            for row in cells:
                table.add_row(*(Text(cell, overflow="fold") for cell in row))
            self.print(table)
            return
        lines = [[cell.replace("\n", "; ") for cell in row] for row in ([list(header)] if header else []) + cells]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        self.out(title)
        for line in lines:
            self.out("  " + "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
        self.out("")

    @contextmanager
    def progress(self, description: str, total: float) -> Iterator[Callable[..., None]]:
        """Yields `update(completed, **shown)`, `shown` being name and value pairs that stand beside the bar.

        In a pipe: one line every 10 seconds and one at the end.
        """
        if self.is_terminal:
            with self._bar() as bar:
                task = bar.add_task(description, total=total, shown="")
                yield lambda completed, **shown: bar.update(task, completed=completed, shown=_pairs(shown))
            return

        last_line, last_printed = "", time.monotonic()

        def update(completed: float, **shown: object) -> None:
            nonlocal last_line, last_printed
            last_line = f"{description} {completed / total:4.0%}  {_pairs(shown)}".rstrip()
            if time.monotonic() - last_printed >= PIPE_SECONDS_PER_LINE:
                self.out(last_line)
                last_line, last_printed = "", time.monotonic()

        try:
            yield update
        finally:
            if last_line:
                self.out(last_line)

    def _bar(self):
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

        columns = ("{task.description}", BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
        return Progress(*columns, TextColumn("{task.fields[shown]}", markup=False), console=self)


def _pairs(shown: dict[str, object]) -> str:
    return "  ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in shown.items()
    )
