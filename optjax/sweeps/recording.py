"""Records of a sweep under way, for the tools that people watch runs with."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from optjax.support.errors import UserError
from optjax.sweeps.grid import label

if TYPE_CHECKING:
    import xarray

    from optjax.sweeps.results import Results

OnRecords = Callable[["xarray.Dataset"], None]
"""Called with the new records of some runs; see `sweep`."""


def new_records(
    results: "Results", runs: np.ndarray, first: int, values: dict[str, np.ndarray]
) -> "xarray.Dataset":
    """Return new records with axes ``run`` and ``step``, and each run's point and seed."""
    import xarray as xr

    count, seeds = next(iter(values.values())).shape[1], len(results.seeds)
    points = runs // seeds
    labels: dict[str, Any] = {"seed": np.asarray(results.seeds)[runs % seeds]}
    labels |= {
        name: np.array([label(column[i]) for i in points])
        for name, column in results.columns.items()
    }
    coords: dict[str, Any] = {name: ("run", value) for name, value in labels.items()}
    coords["step"] = results.every * np.arange(first + 1, first + count + 1)
    found = {
        name: (("run", "step", *(f"{name}_{i}" for i in range(rows.ndim - 2))), rows)
        for name, rows in values.items()
    }
    return xr.Dataset(found, coords, {"labels": list(labels)})


def by_examples(dataset: "xarray.Dataset") -> "xarray.Dataset":
    """Return a sweep's records on an axis of examples seen, step × batch size, in place of steps.

    Batch sizes compare at equal examples: at multiples of what the largest batch sees from record
    to record, of each batch size the last record up to there.

    Raises:
      UserError: batch_size is no axis; the smallest batch saw fewer examples than one such record.

    >>> import optax, optjax as oj
    >>> run = oj.make_run(oj.least_squares([[2.0, 1.0], [0.0, 1.0]], [2.0, 1.0]), optax.sgd, 4)
    >>> found = oj.sweep(run, {"learning_rate": [0.1], "batch_size": [1, 2]})
    >>> oj.by_examples(found).loss.sel(batch_size=1).coords["examples"].values.tolist()
    [2, 4]
    """
    import xarray as xr

    if "batch_size" not in dataset.dims or "step" not in dataset.dims:
        raise UserError("by_examples needs records and an axis batch_size: sweep over it")
    sizes, steps = dataset.batch_size.values.astype(int), dataset.step.values
    every = int(steps[0])
    each, most = every * int(sizes.max()), int(steps[-1] * sizes.min())
    if most < each:
        raise UserError(
            f"batch {sizes.min()} saw {most} examples and batch {sizes.max()} is recorded every "
            f"{each}: record more often, or take more steps"
        )
    examples = np.arange(each, most + 1, each)
    at = xr.DataArray(
        examples[None] // (every * sizes[:, None]) - 1,
        {"batch_size": dataset.batch_size, "examples": examples}, ("batch_size", "examples"),
    )  # fmt: skip
    return dataset.isel(step=at)


def json_lines(path: str | os.PathLike[str]) -> OnRecords:
    """Make an `on_records` that appends each record to a file, a JSON object a line.

    After a kill, records since the last checkpoint come twice.

    Raises:
      UserError: the file cannot be written.

    >>> import tempfile, optax, optjax as oj
    >>> run = oj.make_run(oj.least_squares([[2.0], [1.0]], [2.0, 1.0]), optax.sgd, 2)
    >>> file = tempfile.NamedTemporaryFile()
    >>> found = oj.sweep(run, {"learning_rate": [0.1]}, on_records=oj.json_lines(file.name))
    >>> sorted(json.loads(file.read().splitlines()[0]))
    ['learning_rate', 'loss', 'seed', 'step']
    """
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a", encoding="utf-8"):
            pass
    except OSError as error:
        raise UserError(f"cannot write {str(path)!r} ({error.strerror or error})") from None

    def write(records: "xarray.Dataset") -> None:
        with open(path, "a", encoding="utf-8") as file:
            for row in _rows(records):
                file.write(json.dumps(row) + "\n")

    return write


def scalars(writer: Callable[[str], Any]) -> OnRecords:
    """Make an `on_records` for TensorBoard, and what else has ``add_scalar(tag, value, step)``.

    Args:
      writer: makes the writer of a run from its name, as in
        ``oj.scalars(lambda name: SummaryWriter(f"logs/{name}"))``; called once a run.
    """
    writers: dict[str, Any] = {}

    def write(records: "xarray.Dataset") -> None:
        labels = records.attrs["labels"]
        for row in _rows(records):
            name = " ".join(f"{key}={row.pop(key)}" for key in [*labels[1:], labels[0]])
            name = name.replace("/", "_")
            if name not in writers:
                writers[name] = writer(name)
            step = row.pop("step")
            for tag, value in row.items():
                if not isinstance(value, list):
                    writers[name].add_scalar(tag, np.nan if value is None else value, step)

    return write


def _rows(records: "xarray.Dataset") -> Any:
    """Yield each record as a dict; without those past a run's end. What is not finite is None."""
    labels = [(name, records[name].values.tolist()) for name in records.attrs["labels"]]
    values = {str(name): rows.values for name, rows in records.data_vars.items()}
    steps = records.step.values.tolist()
    for i in range(records.sizes["run"]):
        for j, step in enumerate(steps):
            row = {name: _plain(rows[i, j]) for name, rows in values.items()}
            if any(value is not None for value in row.values()):
                yield {**{name: column[i] for name, column in labels}, "step": step, **row}


def _plain(value: np.ndarray) -> Any:
    if np.ndim(value):
        return [_plain(one) for one in value]
    return float(value) if np.isfinite(value) else None
