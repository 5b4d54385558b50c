"""The display of an experiment's progress: a bar on a terminal, a few lines elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TextIO

_EVERY_SECONDS = 30.0


def silent(text: str, fraction: float) -> None:
    """Ignore progress: the default of an experiment called from Python."""


class Console:
    """A stream for lines and progress; `quiet` writes nothing.

    >>> import sys
    >>> Console(sys.stdout).line("noise: done")
    noise: done
    """

    def __init__(self, stream: TextIO | None = None, *, quiet: bool = False) -> None:
        self.stream = stream or sys.stderr
        self.quiet = quiet

    def line(self, text: str) -> None:
        """Print one line."""
        if not self.quiet:
            print(text, file=self.stream, flush=True)

    @contextmanager
    def progress(self, name: str) -> Iterator[Callable[[str, float], None]]:
        """Yield a function of (text, fraction in [0, 1]) that shows an experiment's progress."""
        if self.quiet:
            yield lambda text, fraction: None
        elif self.stream.isatty():
            yield from self._bar(name)
        else:
            yield self._lines(name)

    @contextmanager
    def late(self, name: str, after: float = 2.0) -> Iterator[Callable[[str, float], None]]:
        """Yield one like `progress` that shows nothing in the first `after` seconds."""
        begin, shown = time.monotonic(), ExitStack()
        inner: list[Callable[[str, float], None]] = []

        def show(text: str, fraction: float) -> None:
            if not inner and time.monotonic() - begin >= after:
                inner.append(shown.enter_context(self.progress(name)))
            if inner:
                inner[0](text, fraction)

        with shown:
            yield show

    def _bar(self, name: str) -> Iterator[Callable[[str, float], None]]:
        from rich.console import Console as RichConsole
        from rich.markup import escape
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
        from rich.progress import TimeElapsedColumn as Elapsed

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            Elapsed(),
        )
        with Progress(*columns, console=RichConsole(file=self.stream), transient=True) as bar:
            task = bar.add_task(escape(name), total=1.0)

            def show(text: str, fraction: float) -> None:
                bar.update(task, description=escape(f"{name}: {text}"), completed=fraction)

            yield show

    def _lines(self, name: str) -> Callable[[str, float], None]:
        self.line(f"{name}: running")
        last = time.monotonic()

        def show(text: str, fraction: float) -> None:
            nonlocal last
            if time.monotonic() - last >= _EVERY_SECONDS:
                last = time.monotonic()
                self.line(f"{name}: {100 * fraction:.0f} % {text}")

        return show
