"""One run of a list of benchmarks: a budget of time, a file saved after every round."""

import contextlib
import itertools
import json
import math
import signal
import sys
import time
import traceback
from argparse import ArgumentParser
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

import jax

from optjax.support.errors import UserError, nearest
from optjax.support.files import write_text
from optjax.support.machine import cores
from optjax.support.provenance import commit, machine, versions

from .measure import Entry, load_average


class Bench:
    """One run of the benchmarks; saved after every round.

    Args:
      seconds: what all of it may take. What would take longer than is left is not run, what does
        take longer is broken off, and both are noted.
      clock: seconds since some moment.
    """

    def __init__(
        self,
        entries: list[Entry],
        repeats: int,
        quick: bool,
        output: Path,
        *,
        seconds: float = math.inf,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.entries, self.repeats, self.output = entries, repeats, output
        self.clock, self.end = clock, clock() + seconds
        try:
            torch = metadata.version("torch")
        except metadata.PackageNotFoundError:
            torch = "absent"
        self.facts: dict[str, Any] = {
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "finished": False,
            "quick": quick,
            "repeats": repeats,
            "machine": machine(),
            "versions": versions() | {"torch": torch},
            "commit": commit(),
            "load_average": load_average(),
        }

    def run(self) -> None:
        """Measure everything; a benchmark that fails is noted and the next one follows."""
        busy = self.facts["load_average"]
        if busy and busy[0] > 0.5:
            print(
                f"bench: the load average is {busy[0]} on {cores()} cores: other work is running; "
                "trust no time here, and no ratio to PyTorch, whose threads wait for each other",
                file=sys.stderr,
            )
        # A compilation that a cache on disk answers is none.
        jax.config.update("jax_enable_compilation_cache", False)
        said: set[str] = set()
        for entry in self.entries:
            print(f"bench: {entry.name}: {entry.what}", file=sys.stderr, flush=True)
            try:
                self._measure(entry)
            except _OutOfTimeError:
                entry.missing = "broken off: out of time"
            except Exception as error:
                traceback.print_exc()
                first = (str(error).splitlines() or [""])[0]
                entry.missing = f"failed: {type(error).__name__}: {first}"
            if entry.missing:
                print(f"bench: {entry.name}: {entry.missing}", file=sys.stderr, flush=True)
            for note in entry.notes:
                if note not in said:
                    said.add(note)
                    print(f"bench: {note}", file=sys.stderr, flush=True)
            self.save()
        self.facts["finished"] = True
        self.save()

    @property
    def failed(self) -> list[str]:
        """The benchmarks that raised."""
        return [entry.name for entry in self.entries if entry.missing.startswith("failed")]

    def _measure(self, entry: Entry) -> None:
        cost, left = entry.cost(), self.end - self.clock()
        if cost >= left:
            entry.missing = (
                f"not run: out of time (it takes about {cost:.0f} s, {max(0, left):.0f} s are left)"
            )
            return
        with _alarm(left):
            for done in entry.rounds(self.repeats):
                self.save()
                before, left = left, self.end - self.clock()
                if done < self.repeats and before - left >= left:
                    entry.notes.append(f"{entry.name}: {done} of {self.repeats} rounds fitted")
                    break

    def save(self) -> None:
        """Write what there is, whole or not at all."""
        done = [entry.record() for entry in self.entries if entry.values or entry.missing]
        self.output.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.facts | {"benchmarks": done}, indent=2, ensure_ascii=False)
        write_text(self.output, text + "\n")


class _OutOfTimeError(Exception):
    """A benchmark is still running when the time is up."""


@contextlib.contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    """Raise `_OutOfTimeError` in here after so many seconds, where the system has alarms."""
    if seconds == math.inf or not hasattr(signal, "SIGALRM"):
        yield
        return

    def ring(*_: object) -> NoReturn:
        raise _OutOfTimeError

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def carry_out(make: Callable[[], Bench], show: Callable[[Bench], None]) -> int:
    """Run a bench and show its table.

    Returns:
      0; 1 if a benchmark failed; 2 for a user's mistake; 130 if interrupted, what is done stays.
    """
    try:
        bench = make()
        try:
            bench.save()
        except OSError as error:
            why = error.strerror
            raise UserError(f"cannot write {bench.output}: {why}; give another --output") from None
    except UserError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        bench.run()
    except KeyboardInterrupt:
        bench.save()
        show(bench)
        print(f"bench: interrupted; what was measured is in {bench.output}", file=sys.stderr)
        return 130
    show(bench)
    print(f"bench: wrote {bench.output}", file=sys.stderr)
    if bench.failed:
        print(f"bench: failed: {', '.join(bench.failed)}", file=sys.stderr)
    return 1 if bench.failed else 0


def chosen(known: list[Entry], only: Sequence[str] | None) -> list[Entry]:
    """The benchmarks named, each by its name or by what is before a stroke; all by default."""
    if only is None:
        return known
    parts = {
        entry.name: set(itertools.accumulate(entry.name.split("/"), "{}/{}".format))
        for entry in known
    }
    names = set().union(*parts.values())
    for name in only:
        if name not in names:
            raise UserError(f"unknown benchmark {name!r}: {nearest(name, sorted(names))}")
    return [entry for entry in known if parts[entry.name] & set(only)]


class Parser(ArgumentParser):
    """A parser whose mistakes are one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (--help shows the options)")
