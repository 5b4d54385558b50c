"""What is kept of a tuning: the path, and the state to go on from."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from optjax import files
from optjax.errors import UserError
from optjax.tuning.space import Space, named_leaves
from optjax.types import HParams, PyTree

if TYPE_CHECKING:
    import xarray

_STATE = "_state_"


class Book:
    """Rows, one an outer step, of what every start saw; on disk where a file is given."""

    def __init__(
        self,
        theta: HParams,
        space: Space,
        rest: HParams,
        settings: dict[str, Any],
        out: Path | None,
    ) -> None:
        self.theta, self.space, self.rest = theta, space, rest
        self.settings, self.out = settings, out
        self.rows: list[dict[str, np.ndarray]] = []
        self.state: PyTree = None

    @property
    def done(self) -> int:
        """Outer steps taken."""
        return len(self.rows)

    def add(self, state: PyTree, seen: dict[str, np.ndarray]) -> None:
        """Keep an outer step."""
        self.rows.append(seen)
        self.state = state

    def least(self) -> float:
        """The smallest value so far; NaN before there is one."""
        values = np.array([row["value"] for row in self.rows])
        return float(np.nanmin(values)) if np.isfinite(values).any() else np.nan

    def best(self, *, last: bool) -> tuple[dict[str, Any], float]:
        """The best point as a run takes it, and its value.

        Raises:
          UserError: no point's runs stayed finite.
        """
        values = np.array([row["value"] for row in self.rows])  # (K, restarts)
        good = np.isfinite(values)
        if not good.any():
            raise UserError(
                "every point that was tried diverged: start from a smaller learning rate, or "
                "constrain it"
            )
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
            inner = [f"{name}_{i}" if i else f"{name}_index" for i in range(stacked.ndim - 2)]
            variables[name] = (("restart", "outer_step", *inner), stacked)
        found = xr.Dataset(variables)
        found.attrs["tuned"] = json.dumps(self._names())
        logs = [n for n in self._names() if self.space.logarithmic(n.partition(".")[0])]
        found.attrs["logarithmic"] = json.dumps(logs)
        return found

    def save(self) -> None:
        """Write the file, if there is one."""
        if self.out is None or not self.rows:
            return
        found = self.dataset()
        found.attrs["settings"] = json.dumps(self.settings, default=str)
        for i, leaf in enumerate(jax.tree.leaves(self.state)):
            array = np.asarray(leaf)
            found[f"{_STATE}{i}"] = (tuple(f"{_STATE}{i}_{j}" for j in range(array.ndim)), array)
        files.save_dataset(found, self.out)

    def resumed(self, state: PyTree) -> PyTree:
        """The state that the file holds, if there is one; `state` otherwise.

        Raises:
          UserError: the file is of another tuning, or of none.
        """
        if self.out is None or not self.out.exists():
            return state
        attrs = files.read_attrs(self.out)
        if "settings" not in attrs or "tuned" not in attrs:
            raise UserError(f"{self.out} holds no tuning: give another file, or remove it")
        before = json.loads(str(attrs["settings"]))
        now = json.loads(json.dumps(self.settings, default=str))
        for name in now:
            if before.get(name) != now[name]:
                raise UserError(
                    f"{self.out} holds another tuning: {name} was {before.get(name)} and is "
                    f"{now[name]}; give another file, or remove it"
                )
        found = files.read_dataset(self.out)
        rows = {n: v.values for n, v in found.data_vars.items() if not str(n).startswith(_STATE)}
        count = found.sizes["outer_step"]
        self.rows = [{str(n): v[:, k] for n, v in rows.items()} for k in range(count)]
        leaves, structure = jax.tree.flatten(state)
        kept = [found[f"{_STATE}{i}"].values for i in range(len(leaves))]
        if any(a.shape != b.shape for a, b in zip(kept, leaves, strict=True)):
            raise UserError(f"{self.out} holds the state of another optimiser: give another file")
        self.state = jax.tree.unflatten(
            structure, [jnp.asarray(a, b.dtype) for a, b in zip(kept, leaves, strict=True)]
        )
        return self.state
