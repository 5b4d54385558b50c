"""``make bench-accelerator``: what a GPU makes of it, to results/bench-accelerator.json.

Command: python -m optjax.experiments.bench.accelerator [--minutes M] [--epochs N] [--seeds 1,8]
[--only NAME] [--quick] [--output FILE]
Cost: at most --minutes, by default 8; what no longer fits is not run, and the table says so.
The source's protocol from 1 to 256 seeds beside what the device copies and multiplies at most,
the sweep of least squares, the exact modes of hypergradients, and PyTorch. A training is all of
`oj.sweep`: the loss on every picture at its end too.
"""

import argparse
import functools
import itertools
import json
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from optjax.support.errors import UserError

from . import device_limits, hypergradients, nets, sweeps
from .benchmark import Bench, Parser, carry_out, chosen
from .measure import Entry, Side, summary
from .peers import NO_TORCH, NoPeerError, alone
from .trainings import NAMES, QUICK, ROUNDS, TrainingSizes, training_data, trainings

TARGET, TRAININGS = 6.0, 64
"""Seconds that so many trainings of the source's protocol may take on an H100 or H200."""

TORCH_STEPS = 300
"""PyTorch's steps are alike: so many are run, and their time is scaled."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmarks; see `carry_out`."""

    def make() -> Bench:
        options = _parse(argv)
        sizes = QUICK if options.quick else TrainingSizes()
        sizes = sizes._replace(
            epochs=options.epochs or sizes.epochs, seeds=options.seeds or sizes.seeds
        )
        data, source = training_data(sizes)
        entries = chosen(_entries(sizes, options.quick, data), options.only)
        bench = Bench(entries, ROUNDS, options.quick, options.output, seconds=60 * options.minutes)
        bench.facts |= {
            "minutes": options.minutes,
            "protocol": str(sizes),
            "pictures": source,
        }
        return bench

    return carry_out(make, show)


def _entries(sizes: TrainingSizes, quick: bool, data: tuple[np.ndarray, np.ndarray]) -> list[Entry]:
    on_cpu = jax.default_backend() == "cpu"
    device = device_limits.CPU if on_cpu else device_limits.LimitSizes()
    limits = device_limits.entries(device_limits.QUICK if quick else device)

    def limit(name: str) -> float | None:
        found = [entry.values[name] for entry in limits if name in entry.values]
        return summary(found[0])["median"] if found else None

    squares = sweeps.QUICK if quick else sweeps.SweepSizes()
    gradients = hypergradients.QUICK if quick else hypergradients.HypergradientSizes()
    return [
        *limits,
        *(training.entry() for training in trainings(sizes, data, limit)),
        Entry(
            "least-squares",
            f"{squares.runs} RMSProp runs of least squares ({squares})",
            "s",
            "oj.sweep",
            lambda _: sweeps.squares(squares),
            cost=lambda: 15.0,
        ),
        *(
            Entry(
                f"hypergradient/{steps}",
                f"by learning rate and weight decay, T = {steps} ({gradients})",
                "s",
                "bare run",
                functools.partial(hypergradients.times, sizes=gradients, steps=steps),
                cost=lambda: 20.0,
            )
            for steps in (gradients.steps[:1] if quick else gradients.steps)
        ),
        *(
            Entry(
                f"torch/{name}/{how}",
                f"a training of {name} in PyTorch, channels_last, {how} ({sizes})",
                "s",
                None,
                functools.partial(_torch, name=name, compiled=how == "compiled", sizes=sizes),
                cost=lambda: 20.0,
            )
            for name in (NAMES[:1] if quick else NAMES)
            for how in (("eager",) if quick else ("eager", "compiled"))
        ),
    ]


def _torch(entry: Entry, name: str, compiled: bool, sizes: TrainingSizes) -> list[Side]:
    backend, net = jax.default_backend(), sizes.net
    if find_spec("torch") is None or backend not in ("cpu", "gpu"):
        entry.missing = NO_TORCH if backend in ("cpu", "gpu") else f"no PyTorch for {backend}"
        return []
    steps = sizes.epochs * sizes.batches
    part = min(steps, TORCH_STEPS)
    asked = {
        "batch_size": net.batch_size,
        "side": net.side,
        "filters": net.filters,
        "colours": net.colours,
        "rate": nets.RATE,
        "steps": part,
        "gpu": backend == "gpu",
        "compiled": compiled,
    }
    try:
        found = alone("PyTorch", "torch_training", name, json.dumps(asked))
    except NoPeerError as reason:
        entry.missing = str(reason)
        return []
    each = found["seconds"]
    if part < steps:
        entry.notes.append(f"PyTorch: {part} of {steps} steps are run and their time is scaled")
    entry.facts |= {
        "pictures_a_second": net.batch_size / each,
        "trainings_a_second": 1 / (each * steps),
    }
    return [Side("torch.compile" if compiled else "eager", lambda: each * steps, 1)]


# --------------------------------------------------------------------------------- what is shown


def show(bench: Bench) -> None:
    """Print the table and whether the target was met, and save that too."""
    bench.facts["target"] = verdicts(bench)
    bench.save()
    device = bench.facts["machine"]["device"]
    table = Table(title=f"{device}: medians", caption=bench.facts["protocol"])
    table.add_column("benchmark", no_wrap=True)
    for name in ("median", "compile s", "pictures/s", "trainings/s", "of matrix peak", "of copy"):
        table.add_column(name, justify="right")
    table.add_column("peak GiB", justify="right")
    table.add_column("layout, or why not")
    for _, group in itertools.groupby(bench.entries, lambda entry: entry.name.partition("/")[0]):
        for entry in group:
            _rows(table, entry)
        table.add_section()
    # Piped into a file, rich would fold the table to 80 columns.
    console = Console(width=None if sys.stdout.isatty() else 170)
    console.print(table)
    for line in bench.facts["target"]:
        console.print(line)


def _rows(table: Table, entry: Entry) -> None:
    facts = entry.facts
    told = (
        _text(facts.get("seconds_to_compile"), ".1f"),
        _text(facts.get("pictures_a_second"), ",.0f"),
        _text(facts.get("trainings_a_second"), ".3g"),
        _text(facts.get("of_matrix_peak"), ".1%"),
        _text(facts.get("of_copy_bandwidth"), ".1%"),
        _text(facts.get("peak_gib"), ".2f"),
        facts.get("layout", ""),
    )
    for side, values in entry.values.items():
        name = entry.name if entry.facts else f"{entry.name}: {side}"
        table.add_row(name, f"{summary(values)['median']:.3g} {entry.unit}", *told)
    if entry.missing:
        table.add_row(entry.name, "", "", "", "", "", "", "", entry.missing)


def _text(value: Any, form: str) -> str:
    return "" if value is None else format(value, form)


def verdicts(bench: Bench) -> list[str]:
    """A line for each network that was trained from so many seeds: was the target met?"""
    what = f"{TRAININGS} trainings of {TrainingSizes().epochs} epochs"
    goal = f"(target {TARGET:g} s on an H100 or H200)"
    found = []
    for entry in bench.entries if bench.facts["protocol"] == str(TrainingSizes()) else ():
        if entry.values and entry.facts.get("seeds") == TRAININGS:
            taken = summary(entry.values["oj.sweep"])["median"]
            met = "met" if taken <= TARGET else "missed"
            found.append(f"{what}, {entry.name}: {taken:.3g} s {goal}: {met}")
    return found or [f"{what}: not run on this device {goal}"]


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m optjax.experiments.bench.accelerator",
        description=(__doc__ or "").partition("\n")[0],
    )
    parser.add_argument("--minutes", type=float, default=8.0, metavar="M", help="default 8")
    parser.add_argument("--epochs", type=int, metavar="N", help="default 25")
    parser.add_argument("--seeds", type=_seeds, metavar="N,N", help="default 1,8,64,256")
    parser.add_argument(
        "--only",
        action="append",
        metavar="NAME",
        help="limits, train, least-squares, hypergradient, torch, or one such as train/unet/64; "
        "repeatable",
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it run at all?")
    parser.add_argument("--output", type=Path, metavar="FILE", help="default in results/")
    options = parser.parse_args(argv)
    if options.epochs is not None and options.epochs < 1:
        raise UserError(f"epochs is {options.epochs}: expected at least 1")
    if not options.minutes > 0:
        raise UserError(f"minutes is {options.minutes}: expected a number above 0")
    if options.output is None:
        name = "bench-accelerator-quick" if options.quick else "bench-accelerator"
        options.output = Path("results") / f"{name}.json"
    return options


def _seeds(text: str) -> tuple[int, ...]:
    found = tuple(sorted({int(part) for part in text.split(",")}))
    if found[0] < 1:
        raise ValueError(text)
    return found


if __name__ == "__main__":
    sys.exit(main())
