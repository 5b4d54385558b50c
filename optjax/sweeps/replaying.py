"""Run a run of a sweep again, alone."""

import dataclasses
import json
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from optjax.run.core import Trajectory
from optjax.run.trajectory import Run
from optjax.support.errors import UserError, whole
from optjax.support.keys import make_key
from optjax.sweeps.grid import Grid, label
from optjax.sweeps.groups import Point, resolve

if TYPE_CHECKING:
    import xarray


class _Made:
    """What a sweep of this process was made of, for `replay`."""

    def __init__(self, run: Run | Callable[..., Run], grid: Grid) -> None:
        self._run, self.grid = weakref.ref(run), grid

    @property
    def run(self) -> Run | Callable[..., Run] | None:
        """What was swept, while somebody holds it."""
        return self._run()


_WORDS = {"True": True, "False": False, "None": None}
"""Labels of values that are no numbers and no text."""

_MADE: "weakref.WeakValueDictionary[str, _Made]" = weakref.WeakValueDictionary()
_HELD: "weakref.WeakKeyDictionary[Any, dict[str, _Made]]" = weakref.WeakKeyDictionary()


def replay(
    selected: "xarray.Dataset", run: Run | Callable[..., Run] | None = None, *, every: int = 1
) -> Trajectory:
    """Run one run of a sweep again, alone, with the parameters at every record.

    Args:
      selected: one run of a sweep's dataset, as ``dataset.sel(learning_rate=0.1, seed=3)``.
      run: what was swept; found by itself for a sweep of this process.
      every: steps from record to record.

    Returns:
      Its `Trajectory`, with `path`, up to the step to which it came.

    Raises:
      UserError: more than one run is selected, or what was swept is not known.

    >>> import optax, optjax as oj
    >>> run = oj.make_run(oj.least_squares([[2.0, 1.0]], [2.0]), optax.sgd, 20)
    >>> found = oj.sweep(run, {"learning_rate": [0.01, 0.1]}, seeds=2)
    >>> oj.replay(found.sel(learning_rate=0.1, seed=1)).path.shape
    (21, 2)
    """
    every = whole("every", every, 1)
    missing = {"status", "steps_done", "seed"} - {*getattr(selected, "variables", ())}
    if missing or "kind" not in selected.attrs:
        raise UserError("selected is no run of a sweep of runs: expected one of oj.sweep's dataset")
    many = {name: size for name, size in selected["status"].sizes.items() if size > 1}
    if many:
        said = ", ".join(f"{name} ({size})" for name, size in many.items())
        raise UserError(f"several runs are selected, along {said}: choose one with .sel or .isel")
    selected = selected.squeeze(drop=False)
    point = _point(selected, run)
    steps, seed = int(selected["steps_done"]), int(selected["seed"])
    if steps < 1 or steps % every:
        raise UserError(f"every is {every}: expected a divisor of the {steps} steps of the run")
    # The run's own steps stay: a schedule is spread over them.
    plan = dataclasses.replace(
        point.run.plan, steps=point.steps, record_every=every, record_path=True
    )
    again = Run(point.run.problem, plan)
    start = again.init(point.hparams, make_key(seed))
    end, records = again.advance(start, point.hparams, steps)
    return again.finish(start, end, records, point.hparams)


def of_run(selected: "xarray.Dataset", run: Run | Callable[..., Run] | None = None) -> Run:
    """Return the run that a run of a sweep's dataset was of."""
    return _point(selected, run).run


def _point(selected: "xarray.Dataset", run: Run | Callable[..., Run] | None) -> Point:
    """Find the point of the grid that a run of a sweep's dataset was of."""
    made = _MADE.get(str(selected.attrs.get("sweep")))
    if run is None:
        run = None if made is None else made.run
        if run is None:
            raise UserError(
                "what was swept is not known in this process: give it, oj.replay(selected, run)"
            )
    skipped = {"seed", "step", "point"}
    coords = {str(k): v.item() for k, v in selected.coords.items() if k not in skipped}
    coords = {k: v for k, v in coords.items() if v == v and v != ""}  # a name that the point lacks
    named = json.loads(selected.attrs.get("named", "[]"))
    for name, value in coords.items():
        if made is not None:
            coords[name] = _original(made.grid, name, value)
        elif name in named:
            raise UserError(
                f"{name} is {value!r} by name only: replay it in the process that swept it, or "
                "give a run without it"
            )
        else:
            coords[name] = _WORDS.get(value, value)
    return resolve(run, Grid({name: [value] for name, value in coords.items()}, {"point": 1}))[0]


def _original(grid: Grid, name: str, value: Any) -> Any:
    """Return the grid's own value of a coordinate, which may be its label."""
    column = grid.columns.get(name, ())
    same = (v for v in column if label(v) == value or str(label(v)) == value)
    return next(same, value)


def remember(run: Run | Callable[..., Run], grid: Grid, digest: str) -> None:
    """Let `replay` find what was swept, as long as that lives."""
    made = _Made(run, grid)
    try:
        _HELD.setdefault(run, {})[digest] = made  # lives as long as what was swept
    except TypeError:
        return
    _MADE[digest] = made
