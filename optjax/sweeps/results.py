"""What is known of every run of a sweep, on the host; and the dataset that it becomes."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import xarray as xr

from optjax.run.core import Status
from optjax.sweeps.grid import label

STOPPED_BY_HALVING = 1000
"""`stopped_by` of a run that another did better than; the rules of single runs count from 0."""

RUN = "run id"
"""The name of the runs' ids in the store; no metric's."""

KEPT = "kept."
"""Before the name of what is kept of a run, in the store."""

Kind = Literal["sweep", "sweep of hypergradients", "tuning"]
"""What has results."""

_ENDS = ("status", "diverged_at", "stopped_at", "stopped_by", "done")


def real(values: np.ndarray, *, keep_whole: bool = False) -> np.ndarray:
    """Widen values for netCDF and NaN: half precision to single, whole numbers to real.

    >>> real(np.array([1, 2])).dtype, real(np.array([1, 2]), keep_whole=True).dtype
    (dtype('float64'), dtype('int64'))
    """
    values = np.asarray(values)
    if values.dtype in (np.float32, np.float64):
        return values
    if values.dtype.kind in "biu":
        return values if keep_whole else values.astype(np.float64)
    return values.astype(np.float32)


def own_axes(name: str, count: int) -> list[str]:
    """Name the own axes of an array that is kept of every run."""
    return [f"{name}_{i}" for i in range(count)]


class Results:
    """Records and outcomes of N = P · S runs; run p · S + s is point p with seed s.

    Args:
      axes: name → length, of the grid. columns: name → P labels. seeds: S of them.
      steps: T of each point, (P,). every: steps from record to record.
      ids: (P, S) uint64, what the runs are called on disk.
      rules: names of the stop rules.
      inner: what is kept of a run that has ended, each with the names of its own axes.
      kind: of what they are results.
    """

    def __init__(
        self,
        axes: Mapping[str, int],
        columns: Mapping[str, Sequence[Any]],
        seeds: Sequence[int],
        steps: Sequence[int],
        every: int,
        ids: np.ndarray,
        rules: Sequence[str] = (),
        inner: Mapping[str, Sequence[str]] | None = None,
        kind: Kind = "sweep",
    ) -> None:
        self.kind: Kind = kind
        self.axes, self.columns, self.seeds = dict(axes), dict(columns), list(seeds)
        self.every, self.rules, self.inner = every, list(rules), dict(inner or {})
        self.steps = np.repeat(np.asarray(steps, np.int64), len(self.seeds))
        self.ids = np.asarray(ids, np.uint64).ravel()
        n = len(self.ids)
        self.records = int(self.steps.max()) // every
        self.values: dict[str, np.ndarray] = {}
        self.status = np.full(n, Status.RUNNING, np.int32)
        self.diverged_at = np.full(n, -1, np.int32)
        self.stopped_at = np.full(n, -1, np.int32)
        self.stopped_by = np.full(n, -1, np.int32)
        self.kept: dict[str, np.ndarray] = {}
        self.judged = np.zeros(n, bool)
        self.done = np.zeros(n, np.int64)  # steps whose records are here
        self._order = np.argsort(self.ids)

    def __len__(self) -> int:
        return len(self.ids)

    def find(self, ids: np.ndarray) -> np.ndarray:
        """Find the runs of some ids, (L,); −1 where there is none."""
        at = np.searchsorted(self.ids, ids, sorter=self._order)
        runs = self._order[np.minimum(at, len(self) - 1)]
        return np.where(self.ids[runs] == ids, runs, -1)

    def record(
        self, runs: np.ndarray, first: int, count: int, values: Mapping[str, np.ndarray]
    ) -> None:
        """Keep the records `first`, first + 1, … of some runs: name → (L, count, …)."""
        self.records = max(self.records, first + count)
        for name, rows in values.items():
            room = self._room(self.values.get(name), rows.dtype, self.records, *rows.shape[2:])
            room[runs, first : first + count] = rows
            self.values[name] = room
        self.done[runs] = np.maximum(self.done[runs], (first + count) * self.every)

    def end(self, runs: np.ndarray, rows: Mapping[str, np.ndarray]) -> None:
        """Keep the outcomes of runs that have ended; drop records past their end.

        Args:
          rows: name → (L, …): ``status``, ``diverged_at``, ``stopped_at``, ``stopped_by``,
            ``done``, and what is kept of the runs, its names after `KEPT`.
        """
        for name in _ENDS:
            getattr(self, name)[runs] = rows[name]
        self.judged[runs] = True
        for name, values in rows.items():
            if name.startswith(KEPT):
                name, values = name.removeprefix(KEPT), real(values, keep_whole=True)
                room = self._room(self.kept.get(name), values.dtype, *values.shape[1:])
                room[(runs, *map(slice, values.shape[1:]))] = values
                self.kept[name] = room
        for run, last in zip(runs, rows["done"] // self.every, strict=True):
            for values in self.values.values():
                if values.dtype.kind == "f":
                    values[run, last:] = np.nan

    def _room(self, old: np.ndarray | None, kind: np.dtype, *shape: int) -> np.ndarray:
        """Make room for values of a kind: widen the array there is, or make one."""
        if old is None:
            return np.full((len(self), *shape), np.nan if kind.kind == "f" else 0, kind)
        kind = np.promote_types(old.dtype, kind)
        wider = (len(self), *map(max, old.shape[1:], shape))
        if kind == old.dtype and wider == old.shape:
            return old
        new = np.full(wider, np.nan if kind.kind == "f" else 0, kind)
        new[tuple(map(slice, old.shape))] = old
        return new

    def restore(self, facts: Mapping[str, str], arrays: Mapping[str, np.ndarray]) -> None:
        """Take over a frame of the store.

        Raises:
          ValueError, KeyError, IndexError: one that cannot be.
        """
        runs = self.find(arrays[RUN])
        known = runs >= 0
        rows = {name: a[known] for name, a in arrays.items() if name != RUN}
        if facts.get("kind") == "records":
            first, count = int(facts["first"]), int(facts["count"])
            most = self.records + (count if rows and known.any() else 0)  # room is made for data
            follows = 0 <= first <= self.records and count >= 0 and first + count <= most
            if not follows or any(a.shape[1] != count for a in rows.values()):
                raise ValueError(f"{count} records from record {first}")
            self.record(runs[known], first, count, rows)
        else:
            reasons = [-1, *range(len(self.rules)), STOPPED_BY_HALVING]
            possible = np.isin(rows["status"], list(Status)) & np.isin(rows["stopped_by"], reasons)
            done = np.clip(rows["done"], 0, self.records * self.every) // self.every * self.every
            if not possible.all() or (done != rows["done"]).any():
                raise ValueError("an end that cannot be")
            self.end(runs[known], rows)

    def reopen(self) -> None:
        """Reopen runs that ended with fewer steps than they now have; keep those with more."""
        self.steps = np.maximum(self.steps, self.done)
        ended = (self.stopped_at >= 0) | (self.status == Status.DIVERGED)
        self.status[self.judged & ~ended & (self.done < self.steps)] = Status.RUNNING
        self.judged &= ended | (self.done >= self.steps)

    def dataset(self) -> xr.Dataset:
        """Return the dataset, with the axes of the grid, ``seed`` and ``step``."""
        shape = (*self.axes.values(), len(self.seeds))
        dims = (*self.axes, "seed")
        names = ["", *self.rules]
        which = np.where(self.stopped_by < 0, 0, self.stopped_by + 1)
        which = np.where(self.stopped_by == STOPPED_BY_HALVING, len(names), which)
        reason = np.array([*names, "halving"])[np.minimum(which, len(names))].tolist()
        variables: dict[str, Any] = {
            name: ((*dims, "step", *self._inner(name, rows.ndim - 2)),
                   rows.reshape(*shape, *rows.shape[1:]))
            for name, rows in self.values.items()
        }  # fmt: skip
        for name, values in {
            "status": self.status,
            "diverged_at": self.diverged_at,
            "stopped_at": self.stopped_at,
            "steps_done": self.done.astype(np.int32),
        }.items():
            variables[name] = (dims, values.reshape(shape))
        if self.rules or np.any(self.stopped_by >= 0):
            variables["stopped_by"] = (dims, np.array(reason).reshape(shape))  # as read again
        for name in self.inner.keys() - self.kept.keys():  # no run has ended
            if not self.inner[name]:
                variables[name] = (dims, np.full(shape, np.nan))
        for name, values in self.kept.items():
            if not self.judged.all() and values.dtype.kind in "biu":
                values = values.astype(float)
                values[~self.judged] = np.nan
            inner = self._inner(name, values.ndim - 1)
            variables[name] = ((*dims, *inner), values.reshape(*shape, *values.shape[1:]))
        coords: dict[str, Any] = {
            "seed": self.seeds,
            "step": self.every * np.arange(1, self.records + 1),
        }
        for name, column in self.columns.items():
            if name in self.axes:
                coords[name] = self._along(name, column)
            elif "point" in self.axes:
                coords[name] = ("point", _coordinate([label(v) for v in column]))
            else:
                coords[name] = label(column[0])
        found = xr.Dataset(variables, coords)
        found["status"].attrs.update(
            flag_values=[int(s) for s in Status],
            flag_meanings=" ".join(s.name.lower() for s in Status),
        )
        if "final_loss" in found:
            found["final_loss"].attrs["long_name"] = "loss over all training data, without l2 term"
        if "loss" in found:
            found["loss"].attrs["long_name"] = "mean mini-batch loss since the record before"
        found["step"].attrs["long_name"] = "updates done"
        found.attrs["kind"] = self.kind
        if self.kind == "sweep":
            return found
        if self.kind == "tuning":
            path = found.isel(seed=0, step=slice(int(self.done[0])))
            path = path[[*self.values]].drop_vars(["seed", "step"]).rename(step="outer_step")
            for name in {"finite", "diverged"} & {*path.data_vars}:
                path[name] = path[name].astype(bool)
            return path.transpose("restart", "outer_step", ...)
        names = sorted(
            {*self.inner} & {*found}, key=lambda name: (name != "value", name == "finite", name)
        )
        return found[[*names, "status", "diverged_at"]].drop_vars("step", errors="ignore")

    def _inner(self, name: str, count: int) -> list[str]:
        """Name a variable's own axes."""
        return list(self.inner.get(name) or own_axes(name, count))

    def _along(self, axis: str, column: Sequence[Any]) -> np.ndarray:
        """Return the coordinate of a product's axis, out of its column of P values."""
        names = list(self.axes)
        inner = math.prod(list(self.axes.values())[names.index(axis) + 1 :])
        return np.array([label(v) for v in column[:: max(1, inner)][: self.axes[axis]]])


def _coordinate(labels: list[Any]) -> np.ndarray:
    """Make a coordinate of labels; of a point that lacks the name it is empty, or NaN."""
    given = [one for one in labels if one != ""]
    if given and not any(isinstance(one, str) for one in given):
        labels = [np.nan if one == "" else one for one in labels]
    return np.array(labels)
