"""What is kept of a tuning: the path, and the state to go on from."""

import json
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from optjax.support import files
from optjax.support.errors import UserError
from optjax.support.types import HParams, PyTree
from optjax.tuning.facts import changed
from optjax.tuning.space import Space, named_leaves

if TYPE_CHECKING:
    import xarray

_STATE = "_state_"
_EVERY_SECONDS = 10.0
_AXES = ("restart", "outer_step")
_COLUMNS = ("value", "finite", "diverged", "gradient_norm", "value_error")


class Book:
    """Rows, one an outer step, of what every start saw; on disk where a file is given.

    Args:
      theta, rest: the start, and what is not tuned.
      facts: what makes the tuning this one, as names and text.
      out: the file, or None.

    Raises:
      UserError: a hyperparameter has the name of a column or an axis.
    """

    def __init__(
        self,
        theta: HParams,
        space: Space,
        rest: HParams,
        facts: Callable[[], Mapping[str, str]],
        out: Path | None,
    ) -> None:
        self.theta, self.space, self.rest = theta, space, rest
        self.out = out
        self.facts = {} if out is None else dict(facts())
        self.rows: list[dict[str, np.ndarray]] = []
        self.state: PyTree = None
        self._saved, self._when = 0, time.monotonic()
        leaves = named_leaves(theta)
        axes = (axis for name, leaf in leaves.items() for axis in _own_axes(name, leaf.ndim))
        for name in sorted(leaves.keys() & {*_COLUMNS, *_AXES, *axes}):
            raise UserError(
                f"a hyperparameter is named {name!r}, which the path has already: rename it"
            )

    @property
    def done(self) -> int:
        """Outer steps taken."""
        return len(self.rows)

    def add(self, state: PyTree, seen: dict[str, np.ndarray]) -> None:
        """Keep an outer step; on disk, too, where the last time is a while ago."""
        self.rows.append(seen)
        self.state = state
        if time.monotonic() - self._when > _EVERY_SECONDS:
            self.save()

    def seen(self, name: str) -> np.ndarray:
        """A column, (K, restarts, ...)."""
        return np.array([row[name] for row in self.rows])

    def least(self) -> float:
        """The smallest value so far; NaN before there is one."""
        values = self.seen("value")
        return float(np.nanmin(values)) if np.isfinite(values).any() else np.nan

    def best(self, *, last: bool) -> tuple[dict[str, Any], float]:
        """The best point as a run takes it, and its value; the start and NaN if none is finite."""
        values = self.seen("value")  # (K, restarts)
        good = np.isfinite(values)
        if not good.any():
            return {**self.rest, **jax.tree.map(np.asarray, dict(self.theta))}, np.nan
        if last:  # the latest step with a finite point, its best restart
            k = int(np.nonzero(good.any(axis=1))[0][-1])
            r = int(np.nanargmin(values[k]))
        else:
            k, r = (int(i) for i in np.unravel_index(np.nanargmin(values), values.shape))
        leaves = [self.rows[k][name][r] for name in self._names()]
        tuned = jax.tree.unflatten(jax.tree.structure(dict(self.theta)), leaves)
        return {**self.rest, **tuned}, float(values[k, r])

    def _names(self) -> list[str]:
        return list(named_leaves(self.theta))

    def dataset(self) -> "xarray.Dataset":
        """The path."""
        import xarray as xr

        variables = {}
        for name in self.rows[0]:
            stacked = np.stack([row[name] for row in self.rows], axis=1)  # (restarts, K, ...)
            variables[name] = ((*_AXES, *_own_axes(name, stacked.ndim - 2)), stacked)
        found = xr.Dataset(variables)
        found.attrs["tuned"] = json.dumps(self._names())
        logs = [n for n in self._names() if self.space.logarithmic(n.partition(".")[0])]
        found.attrs["logarithmic"] = json.dumps(logs)
        return found

    def save(self) -> None:
        """Write the file, if there is one and it lacks something.

        Raises:
          UserError: it cannot be written.
        """
        if self.out is None or self._saved == self.done:
            return
        found = self.dataset()
        found.attrs["settings"] = json.dumps(self.facts)
        for i, leaf in enumerate(jax.tree.leaves(self.state)):
            array = _stored(leaf)
            found[f"{_STATE}{i}"] = (tuple(f"{_STATE}{i}_{j}" for j in range(array.ndim)), array)
        try:
            files.save_dataset(found, self.out)
        except OSError as error:
            raise UserError(f"cannot write {self.out}: {error.strerror or error}") from error
        self._saved, self._when = self.done, time.monotonic()

    def writable(self) -> None:
        """Try the folder before there is something to lose.

        Raises:
          UserError: it cannot be written to.
        """
        if self.out is None:
            return
        if self.out.is_dir():
            raise UserError(f"cannot write {self.out}: it is a folder; give a file")
        try:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.out.parent):
                pass
        except OSError as error:
            raise UserError(f"cannot write {self.out}: {error.strerror or error}") from None

    def resumed(self, state: PyTree) -> PyTree:
        """The state that the file holds, if there is one; `state` otherwise.

        Raises:
          UserError: the file is of another tuning, or of none.
        """
        if self.out is None or not self.out.is_file():
            return state
        attrs = files.read_attrs(self.out)
        if "settings" not in attrs or "tuned" not in attrs:
            raise UserError(f"{self.out} holds no tuning: give another file, or remove it")
        said = changed(json.loads(str(attrs["settings"])), self.facts)
        if said is not None:
            raise UserError(
                f"{self.out} holds another tuning: {said}; give another file, or remove it"
            )
        found = files.read_dataset(self.out)
        leaves, structure = jax.tree.flatten(state)
        kept = {str(n): v.values for n, v in found.data_vars.items() if str(n).startswith(_STATE)}
        shapes = {f"{_STATE}{i}": _stored(leaf).shape for i, leaf in enumerate(leaves)}
        if {name: array.shape for name, array in kept.items()} != shapes:
            raise UserError(
                f"{self.out} holds the state of another optimiser: give another file, or remove it"
            )
        rows = {str(n): v.values for n, v in found.data_vars.items() if str(n) not in kept}
        count = found.sizes["outer_step"]
        self.rows = [{n: v[:, k] for n, v in rows.items()} for k in range(count)]
        self._saved = count
        back = [_restored(kept[name], leaf) for name, leaf in zip(shapes, leaves, strict=True)]
        self.state = jax.tree.unflatten(structure, back)
        return self.state


def _own_axes(name: str, count: int) -> list[str]:
    return [f"{name}_{i}" if i else f"{name}_index" for i in range(count)]


def _stored(leaf: Any) -> np.ndarray:
    """A leaf of the state as netCDF can hold it."""
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return np.asarray(jax.random.key_data(leaf))
    array = np.asarray(leaf)
    return array.astype(np.float32) if array.dtype.kind == "V" else array  # bfloat16


def _restored(array: np.ndarray, like: Any) -> Any:
    if jax.dtypes.issubdtype(like.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(jnp.asarray(array), impl=jax.random.key_impl(like))
    return jnp.asarray(array, like.dtype)
