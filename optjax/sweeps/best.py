"""The best point of a sweep, and its model."""

import dataclasses
import functools
from typing import Any, Literal

import numpy as np
import xarray as xr

from optjax.run.core import Trajectory
from optjax.run.trajectory import Run
from optjax.support.errors import UserError, nearest
from optjax.support.types import PyTree
from optjax.sweeps.replaying import of_run, replay


@dataclasses.dataclass(frozen=True)
class Best:
    """The best point of a sweep, and the best of its runs. See `best`.

    Attributes:
      point: its hyperparameters, by name.
      value: mean of the metric over its seeds; error: the standard error, NaN of one seed.
      seed: of its best run.
      selected: that run, as `replay` takes it.
      run: what was swept, where it was given.
    """

    point: dict[str, Any]
    value: float
    error: float
    seed: int
    selected: xr.Dataset = dataclasses.field(repr=False)
    run: Any = dataclasses.field(default=None, repr=False)

    @functools.cached_property
    def trajectory(self) -> Trajectory:
        """The run once more, with its parameters at the end."""
        return replay(self.selected, self.run, every=int(self.selected["steps_done"]))

    @property
    def params(self) -> PyTree:
        """The run's parameters at its end."""
        return self.trajectory.params

    def predict(self, inputs: PyTree) -> PyTree:
        """Apply the trained Flax model to inputs, in evaluation mode.

        Raises:
          UserError: the problem is no Flax model.
        """
        of = getattr(of_run(self.selected, self.run).problem.loss, "of", None)
        if of is None:
            raise UserError(
                "predict is for problems of oj.flax_problem: apply your model to params"
            )
        ended = self.trajectory
        return of.net.apply(ended.params, ended.model_state, inputs, train=False)[0]


def last(dataset: xr.Dataset, metric: str) -> xr.DataArray:
    """Return a metric of every run; of one along the run, its last record.

    Raises:
      UserError: an unknown metric.
    """
    ends = {*dataset["status"].dims}
    own = [
        str(name)
        for name, values in dataset.data_vars.items()
        if values.dtype.kind in "fiub" and ends <= {*values.dims} <= ends | {"step"}
    ]
    if metric not in own:
        raise UserError(f"unknown metric {metric!r}: {nearest(metric, own)}")
    values = dataset[metric].astype(float)
    if "step" in values.dims:
        every = int(dataset["step"][0])
        values = values.isel(step=(dataset["steps_done"] // every - 1).clip(min=0))
    return values.drop_vars("step", errors="ignore")


def best(
    dataset: xr.Dataset,
    metric: str = "final_loss",
    mode: Literal["min", "max"] = "min",
    run: Run | Any = None,
) -> Best:
    """Return the point whose mean over the seeds is best, and its best run.

    Args:
      dataset: of `sweep` or `load_sweep`.
      metric: a variable of it; of one along the run, its last record counts.
      mode: "min", or "max" for an accuracy.
      run: what was swept; needed to replay in another process.

    Points with a run that diverged take no part.

    Raises:
      UserError: an unknown metric or mode; no point without a run that diverged.

    >>> import optax, optjax as oj
    >>> run = oj.make_run(oj.least_squares([[2.0, 1.0], [0.0, 1.0]], [2.0, 1.0]), optax.sgd, 100)
    >>> found = oj.best(oj.sweep(run, {"learning_rate": [0.01, 0.1]}, seeds=2))
    >>> found.point, found.seed, found.params.shape
    ({'learning_rate': 0.1}, 0, (2,))
    """
    if mode not in ("min", "max"):
        raise UserError(f"unknown mode {mode!r}: expected 'min' or 'max'")
    values = last(dataset, metric)
    signed = values if mode == "min" else -values
    mean = signed.mean("seed", skipna=False)
    if not np.isfinite(mean).any():
        raise UserError(f"no point has a finite {metric} from every seed: no best one")
    # The axes of the grid, or none for a single point.
    least = mean.argmin([*mean.dims], skipna=True) if mean.dims else {}
    at = {name: int(i) for name, i in least.items()}
    runs = signed.isel(at)
    seed = int(runs.argmin("seed"))
    selected = dataset.isel({**at, "seed": seed})
    names = [str(name) for name in dataset.coords if name not in ("seed", "step", "point")]
    point = {name: selected[name].item() for name in names if not selected[name].ndim}
    spread = float(runs.std("seed", ddof=1)) if runs.size > 1 else np.nan
    return Best(
        {name: value for name, value in point.items() if value == value and value != ""},
        float(values.isel(at).mean()),
        spread / np.sqrt(runs.size),
        int(selected["seed"]),
        selected,
        run,
    )
