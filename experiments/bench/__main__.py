"""``make bench``: times beside peers, to results/bench.json.

Command: python -m optjax.experiments.bench [--repeats N] [--only NAME] [--quick] [--output FILE]
Cost: about twenty minutes on two idle cores. Every side of a benchmark is measured in turn
(A B A B), so that a drift of the machine falls on all of them; read the ratios first. Beside
other work PyTorch loses far more than its share: its threads wait for each other actively.
"""

import argparse
import json
import signal
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

import jax
from rich.console import Console
from rich.table import Table

from optjax.errors import UserError, nearest
from optjax.files import write_text
from optjax.provenance import commit, versions

from . import accounts, hypergradients, least_squares, nets, quadratic, scaling, start_up, sweeps
from .measure import Entry, cores, load_average, machine


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmarks: 0, or 2 for a user's mistake, 130 if interrupted (what is done stays)."""
    try:
        options = _parse(argv)
        output: Path = options.output
        entries = _chosen(options.only, options.quick)
        bench = Bench(entries, options.repeats, options.quick, output)
        try:
            bench.save()
        except OSError as error:
            why = error.strerror
            raise UserError(f"cannot write {output}: {why}; give another --output") from None
    except UserError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        bench.run()
    except KeyboardInterrupt:
        bench.save()
        bench.show()
        print(f"bench: interrupted; what was measured is in {output}", file=sys.stderr)
        return 130
    bench.show()
    print(f"bench: wrote {output}", file=sys.stderr)
    return 0


class Bench:
    """One run of the benchmarks; saved after every round."""

    def __init__(self, entries: list[Entry], repeats: int, quick: bool, output: Path) -> None:
        self.entries, self.repeats, self.output = entries, repeats, output
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
        """Measure everything."""
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
            for _ in entry.rounds(self.repeats):
                self.save()
            for note in entry.notes:
                if note not in said:
                    said.add(note)
                    print(f"bench: {note}", file=sys.stderr, flush=True)
        self.facts["finished"] = True
        self.save()

    def save(self) -> None:
        """Write what there is, whole or not at all."""
        done = [entry.record() for entry in self.entries if entry.values]
        self.output.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.facts | {"benchmarks": done}, indent=2, ensure_ascii=False)
        write_text(self.output, text + "\n")

    def show(self) -> None:
        """Print the table."""
        table = Table(title="medians (lowest to highest); times the reference, round by round")
        table.add_column("benchmark")
        table.add_column("side")
        table.add_column("time", justify="right")
        table.add_column("ratio", justify="right")
        for entry in self.entries:
            record = entry.record()
            for i, (side, times) in enumerate(record["sides"].items()):
                ratio = record["ratios"].get(side)
                table.add_row(
                    entry.name if i == 0 else "",
                    side,
                    f"{_span(times)} {entry.unit}",
                    "1" if side == entry.reference else _span(ratio) if ratio else "",
                )
            table.add_section()
        # Piped into a file, rich would fold the table to 80 columns.
        Console(width=None if sys.stdout.isatty() else 130).print(table)


def _span(values: dict[str, float]) -> str:
    return f"{values['median']:.3g} ({values['min']:.3g} to {values['max']:.3g})"


def _chosen(only: list[str] | None, quick: bool) -> list[Entry]:
    """The benchmarks named, each by its name or by the part before the stroke."""
    known = [
        *start_up.entries(),
        *least_squares.entries(least_squares.QUICK if quick else least_squares.Sizes()),
        *sweeps.entries(sweeps.QUICK if quick else sweeps.Sizes()),
        *accounts.entries(2 if quick else 100),
        *nets.entries(nets.QUICK if quick else nets.Sizes()),
        *quadratic.entries(quadratic.QUICK if quick else quadratic.Sizes()),
        *scaling.entries(scaling.QUICK if quick else scaling.Sizes()),
        *hypergradients.entries(hypergradients.QUICK if quick else hypergradients.Sizes()),
    ]
    names = {name for entry in known for name in (entry.name, entry.name.partition("/")[0])}
    for name in only or ():
        if name not in names:
            raise UserError(f"unknown benchmark {name!r}: {nearest(name, sorted(names))}")
    return [
        entry
        for entry in known
        if only is None or entry.name in only or entry.name.partition("/")[0] in only
    ]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (--help shows the options)")


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = _Parser(
        prog="python -m optjax.experiments.bench", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="rounds (default 5)")
    parser.add_argument(
        "--only",
        action="append",
        metavar="NAME",
        help="accounting, step, sweep, compile, start-up, gradient, hypergradient, quadratic, "
        "scaling, or one such as step/unet; repeatable",
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it run at all?")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="default results/bench.json, with --quick results/bench-quick.json",
    )
    options = parser.parse_args(argv)
    if options.repeats < 1:
        raise UserError(f"repeats is {options.repeats}: expected at least 1")
    if options.output is None:
        options.output = Path("results") / ("bench-quick.json" if options.quick else "bench.json")
    return options


if __name__ == "__main__":
    sys.exit(main())
