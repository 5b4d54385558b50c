"""What a person sees of a sweep, and how a person stops it."""

import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from optjax.sweeps.results import Results

Progress = Callable[[str, float], None]


class Meter:
    """Tells `progress` how many runs are done, how fast it goes and how long it will take."""

    def __init__(
        self, results: Results, progress: Progress, describe: Callable[[], str] | None = None
    ) -> None:
        self.results, self.progress, self.describe = results, progress, describe
        self.seen = time.perf_counter(), int(results.done.sum())  # at the last look
        self.speeds: list[float] = []  # steps a second, a chunk each

    def show(self, over: np.ndarray) -> None:
        """Say where the sweep stands; `over`, (N,) bool: runs that have stopped or diverged."""
        results = self.results
        done = int(results.done.sum())
        over = over | results.judged
        total = max(1, int(np.where(over, results.done, results.steps).sum()))
        speed = self._speed(done)
        ended = int(np.sum(over | (results.done >= results.steps)))
        diverged = int(np.sum(results.diverged_at >= 0))
        # The first chunk has compiled, too: it tells no time.
        left = (total - done) / speed if speed > 0 and len(self.speeds) > 1 else math.inf
        text = (
            f"{ended:,} of {len(results):,} runs"
            + (f", {diverged:,} diverged" if diverged else "")
            + f", {_si(speed)} steps/s"
            + (f", {_duration(left)} left" if math.isfinite(left) and done < total else "")
        )
        self.progress(self.describe() if self.describe else text, min(1.0, done / total))

    def _speed(self, done: int) -> float:
        """Return the median speed of the last chunks."""
        (then, before), now = self.seen, time.perf_counter()
        if done > before:
            self.speeds.append((done - before) / max(1e-9, now - then))
            self.seen = now, done
        recent = self.speeds[1:][-_RECENT:] or self.speeds
        return float(np.median(recent)) if recent else 0.0


_RECENT = 7


class Interrupt:
    """The first Ctrl-C, SIGTERM or SIGHUP is obeyed after the chunk under way, a second at once."""

    def __init__(self) -> None:
        self.asked = False
        self.number = int(signal.SIGINT)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Catch them in the main thread, unless ignored; the handlers before are put back."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        asking = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        found = {name: signal.getsignal(name) for name in asking}
        before = {name: old for name, old in found.items() if old != signal.SIG_IGN}
        for name in before:
            signal.signal(name, self._obey)
        try:
            yield
        finally:
            for name, handler in before.items():
                signal.signal(name, handler)

    def error(self) -> KeyboardInterrupt:
        """Return what to raise, with the number of the signal."""
        return KeyboardInterrupt(self.number)

    def _obey(self, number: int, frame: Any) -> None:
        self.number = number
        if self.asked:
            raise self.error()
        self.asked = True
        os.write(2, b"\noptjax: stopping after the chunk under way; once more: at once\n")


def _si(x: float) -> str:
    """Write a number to three digits with its prefix.

    >>> _si(1234567.0)
    '1.23M'
    """
    for factor, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if x >= factor:
            return f"{x / factor:.3g}{prefix}"
    return f"{x:.3g}"


def _duration(seconds: float) -> str:
    """Write seconds for people.

    >>> _duration(75)
    '1 min 15 s'
    """
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    minutes, seconds = divmod(seconds, 60)
    if minutes < 60:
        return f"{minutes} min {seconds} s"
    return f"{minutes // 60} h {minutes % 60} min"
