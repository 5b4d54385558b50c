"""A hypergradient at every point of a grid from every seed: each a lane, as a sweep's runs are."""

import dataclasses
import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from optjax.hypergradients.hypergradient import HypergradFn
from optjax.run.trajectory import Run
from optjax.support.errors import UserError
from optjax.sweeps.book import Book
from optjax.sweeps.buckets import Batching, Point, resolve
from optjax.sweeps.gradient_book import Results
from optjax.sweeps.gradient_lanes import block, is_number, planned, put
from optjax.sweeps.grid import Grid, label
from optjax.sweeps.layouts import device_memory
from optjax.sweeps.processes import agreed, fetch
from optjax.sweeps.program import lanes_mesh
from optjax.sweeps.progress import Meter, Progress

if TYPE_CHECKING:
    import xarray

_TREES = ("initial_params", "example_weights")
"""Hyperparameters that a run takes and a sweep of runs does not."""

_SENSELESS = {
    "stop": "the gradient is that of the whole run",
    "keep_diverged": "the gradient of a diverged run is NaN",
    "final": "what is looked at is `of`",
    "out": "save the dataset with .to_netcdf(path)",
    "anew": "there is no folder",
    "lanes": "tile says how many go at a time",
    "chunk_steps": "tile says how many go at a time",
    "chunk_seconds": "tile says how many go at a time",
    "checkpoint_seconds": "there is no folder",
    "about": "there is no folder",
}

_MOST = 128
"""Lanes of a call on the CPU: more take no less time each, and show no progress between them."""


@dataclasses.dataclass(frozen=True)
class _Held:
    """A value that is no number, called by its place on the axis."""

    value: Any
    name: str


def parted(run: Any) -> tuple[Any, dict[int, HypergradFn]]:
    """What makes the runs, and the hypergradient of each run by its id.

    Of a function the second is filled as it is called; of runs it stays empty.
    """
    if isinstance(run, HypergradFn):
        return run.run, {id(run.run): run}
    asked: dict[int, HypergradFn] = {}
    if isinstance(run, Run) or not callable(run):
        return run, asked

    @functools.wraps(run, updated=())
    def make(**shape: Any) -> Any:
        made = run(**shape)
        if not isinstance(made, HypergradFn):
            return made
        own = dataclasses.replace(made.run)  # one run may have several hypergradients
        asked[id(own)] = dataclasses.replace(made, run=own)
        return own

    make.__name__ = str(label(run))
    return make, asked


def held(grid: Any) -> Any:
    """A dict of axes, their arrays, trees and schedules under names of their own."""
    if not isinstance(grid, Mapping):
        return grid
    return {
        name: [_Held(value, str(i)) for i, value in enumerate(axis)]
        if isinstance(axis, list | tuple) and not all(map(is_number, axis))
        else axis
        for name, axis in grid.items()
    }


def resolved(runs: Any, grid: Grid) -> list[Point]:
    """As `resolve`, of a grid from `held`."""
    columns = {
        name: [v.value if isinstance(v, _Held) else v for v in column]
        for name, column in grid.columns.items()
    }
    trees = {name: columns.pop(name) for name in _TREES if name in columns}
    return [
        point._replace(
            hparams=dict(
                point.run.checked({**point.hparams, **{n: c[i] for n, c in trees.items()}})
            )
        )
        for i, point in enumerate(resolve(runs, Grid(columns, grid.axes)))
    ]


def refuse(**given: Any) -> None:
    """What a sweep of runs takes and a sweep of hypergradients does not, where it was given."""
    said = [f"{name} ({_SENSELESS[name]})" for name, value in given.items() if value]
    if said:
        raise UserError(f"a sweep of hypergradients takes no {', no '.join(said)}: leave it out")


def compute(
    points: Sequence[Point],
    asked: Mapping[int, HypergradFn],
    grid: Grid,
    seeds: Sequence[int],
    devices: Sequence[Any],
    show: Progress,
    batching: Batching,
    tile: int | None,
    memory: float | None,
) -> "xarray.Dataset":
    """The dataset, with its axes and what was done in its attributes.

    Args:
      asked: the hypergradient of each point's run, by the run's id.
      grid, seeds, …: as `sweep` has them.
    """
    mesh = lanes_mesh(list(devices)) if len(devices) > 1 or jax.process_count() > 1 else None
    columns = {name: [label(v) for v in column] for name, column in grid.columns.items()}
    ids = np.arange(len(grid) * len(seeds))  # they are for a folder, and there is none
    book = Book(grid.axes, columns, seeds, [p.steps for p in points], 1, ids)
    work = list(planned(points, asked, batching))
    results = Results(book)
    for lanes in work:
        args = lanes.given(book.seeds, lanes.bucket.points[:1] * len(book.seeds))
        results.expect(jax.eval_shape(functools.partial(block, lanes.program, None), *args))
    results.begin()
    meter, notes = Meter(book, show), []
    for lanes in work:
        first = lanes.bucket.points[:, None] * len(book.seeds)
        runs = (first + np.arange(len(book.seeds))[None]).ravel()
        most = tile or _fitting(lanes.each, memory, devices[0])
        size = _size(len(runs), most, len(devices))
        shared = put(lanes.given(book.seeds, runs[:1])[0], mesh, devices[0])
        for begin in range(0, len(runs), size):
            part = runs[begin : begin + size]
            filled = np.append(part, np.repeat(part[:1], size - len(part)))
            own = put(lanes.given(book.seeds, filled)[1], mesh, devices[0], "lane")
            results.end(part, fetch(block(lanes.program, mesh, shared, own)))
            meter.show(book.judged)
        notes.append(
            {
                "bucket": lanes.bucket.name,
                "runs": len(runs),
                "mode": lanes.program.mode.name,
                "why": lanes.why,
                "layout": f"{size} lanes a call, {-(-len(runs) // size)} calls",
                "bytes of a lane": lanes.each,
            }
        )
    dataset = results.dataset()
    dataset.attrs.update(
        problem=_listed(p.run.problem.name for p in points),
        optimizer=_listed(label(p.run.plan.optimizer) for p in points),
        of=_listed(fn.job.name for fn in asked.values()),
        mode=_listed(note["mode"] for note in notes),
        why="; ".join(dict.fromkeys(note["why"] for note in notes)),
        buckets=json.dumps(notes),
    )
    return dataset


def _fitting(each: int, memory: float | None, device: Any) -> int:
    """How many lanes of so many bytes go on the device at a time."""
    most = max(1.0, (memory or device_memory(device)) / each)
    return agreed(min(most, _MOST) if device.platform == "cpu" else most)[0]


def _size(runs: int, most: int, devices: int) -> int:
    """Lanes of a call: one size for all calls, so that few lanes fill the last one up.

    >>> _size(12, 5, 1), _size(9, 4, 2)
    (4, 6)
    """
    calls = -(-runs // (most * devices))
    size = -(-runs // calls)
    return size + -size % devices


def _listed(names: Iterable[Any]) -> str:
    return ", ".join(dict.fromkeys(map(str, names)))
