"""The display of an experiment's progress: a bar on a terminal, a few lines elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TextIO

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
        self._bars: Any = None  # of rich, while any is shown

    def line(self, text: str) -> None:
        """Print one line."""
        if self._bars is not None:
            self._bars.console.print(text, markup=False, highlight=False, soft_wrap=True)
        elif not self.quiet:
            print(text, file=self.stream, flush=True)

    @contextmanager
    def progress(self, name: str) -> Iterator[Callable[[str, float], None]]:
        """Yield a function of (text, fraction in [0, 1]) that shows an experiment's progress."""
        if self.quiet:
            yield silent
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

        if self._bars is None:
            columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
            console = RichConsole(file=self.stream)
            self._bars = Progress(*columns, Elapsed(), console=console, transient=True)
            self._bars.start()
        bars = self._bars
        task = bars.add_task(escape(name), total=1.0)
        try:
            yield lambda text, fraction: bars.update(
                task, description=escape(f"{name}: {text}"), completed=fraction
            )
        finally:
            bars.remove_task(task)
            if not bars.tasks:
                bars.stop()
                self._bars = None

    def _lines(self, name: str) -> Callable[[str, float], None]:
        self.line(f"{name}: running")
        last = time.monotonic()

        def show(text: str, fraction: float) -> None:
            nonlocal last
            if time.monotonic() - last >= _EVERY_SECONDS:
                last = time.monotonic()
                self.line(f"{name}: {100 * fraction:.0f} % {text}")

        return show
