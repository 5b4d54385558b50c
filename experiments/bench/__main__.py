"""``make bench``: times beside peers, to results/bench.json.

Command: python -m optjax.experiments.bench [--repeats N] [--only NAME] [--quick] [--output FILE]
Cost: about twenty minutes on two idle cores. Every side of a benchmark is measured in turn
(A B A B), so that a drift of the machine falls on all of them; read the ratios first. Beside
other work PyTorch loses far more than its share: its threads wait for each other actively.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from optjax.support.errors import UserError

from . import (
    accounts,
    hypergradients,
    least_squares,
    nets,
    quadratic,
    scaling_fits,
    start_up,
    sweeps,
)
from .benchmark import Bench, Parser, carry_out, chosen
from .measure import Entry


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmarks; see `carry_out`."""

    def make() -> Bench:
        options = _parse(argv)
        entries = _chosen(options.only, options.quick)
        return Bench(entries, options.repeats, options.quick, options.output)

    return carry_out(make, show)


def show(bench: Bench) -> None:
    """Print the table."""
    table = Table(title="medians (lowest to highest); times the reference, round by round")
    table.add_column("benchmark")
    table.add_column("side")
    table.add_column("time", justify="right")
    table.add_column("ratio", justify="right")
    for entry in bench.entries:
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
    known = [
        *start_up.entries(),
        *least_squares.entries(least_squares.QUICK if quick else least_squares.LeastSquaresSizes()),
        *sweeps.entries(sweeps.QUICK if quick else sweeps.SweepSizes()),
        *accounts.entries(2 if quick else 100),
        *nets.entries(nets.QUICK if quick else nets.NetSizes()),
        *quadratic.entries(quadratic.QUICK if quick else quadratic.QuadraticSizes()),
        *scaling_fits.entries(scaling_fits.QUICK if quick else scaling_fits.ScalingSizes()),
        *hypergradients.entries(
            hypergradients.QUICK if quick else hypergradients.HypergradientSizes()
        ),
    ]
    return chosen(known, only)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
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
