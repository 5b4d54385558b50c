"""Which solution does each optimiser pick, and does it predict well?"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr

from optjax.experiments.which_solution import small_networks
from optjax.experiments.which_solution.claims import claims as claims
from optjax.experiments.which_solution.contenders import (
    BETA,
    CONTENDERS,
    FACTORS,
    SOLVED,
    Contender,
    final_weights,
    scales,
)
from optjax.experiments.which_solution.data_sets import DataSet, all_sets
from optjax.experiments.which_solution.figures import figures as figures
from optjax.run.batching import Batch
from optjax.run.geometries import hypentropy
from optjax.run.problems import Data, Problem
from optjax.run.trajectory import make_run
from optjax.support.console import silent
from optjax.support.errors import UserError, nearest
from optjax.support.types import HParams, Key, PyTree
from optjax.sweeps import grid, sweep
from optjax.theory.implicit_bias import Certificate, certificate
from optjax.theory.least_norms import Equations, equations

MATRIX = ("sgd", "shampoo", "adam", "sign_sgd", "muon")
"""Optimisers compared on weights that are a matrix."""


@dataclass(frozen=True)
class Config:
    """Of all solutions of an over-parameterised problem, which does each optimiser pick?

    Every run starts from 0 and sees all examples at each step, so the optimiser alone decides.

    Command: optjax run which_solution. Cost: 40 s on two cores.
    Expect: those whose steps keep to the row space end at w*; the others elsewhere, for better
    (sparse weights) or for worse.
    """

    seed: int = 0
    """Seed of the random data sets and of the networks' weights."""
    optimizers: tuple[str, ...] = tuple(CONTENDERS)
    """Which are compared."""
    steps: int = 2000
    """Steps a run."""
    seeds: int = 5
    """Runs of each optimiser on each network."""


def run(config: Config, progress: Callable[[str, float], None] = silent) -> xr.Dataset:
    """Certificates and test errors of every optimiser on every data set, and on two networks."""
    for name in config.optimizers:
        if name not in CONTENDERS:
            raise UserError(f"unknown optimizer {name!r}; {nearest(name, CONTENDERS)}")
    sets = all_sets(config.seed)
    with jax.enable_x64(True):
        found = []
        for i, name in enumerate(config.optimizers):

            def said(text: str, f: float, i: int = i, name: str = name) -> None:
                progress(f"{name}: {text}", 0.5 * (i + f) / len(config.optimizers))

            chosen = [s for s in sets if (name in MATRIX if s.shape else name != "muon")]
            ends = endpoints(CONTENDERS[name], chosen, config.steps, FACTORS, said)
            found.append(_judged(sets, {s.name: ends[j] for j, s in enumerate(chosen)}))
        dataset = xr.concat(found, "optimizer").assign_coords(
            optimizer=list(config.optimizers), data=[s.name for s in sets]
        )
        fields = (config.seed, config.seeds, config.optimizers, config.steps)
        networks = small_networks.trained(*fields, progress)
        return dataset.merge(networks, join="left")


def endpoints(
    contender: Contender,
    sets: Sequence[DataSet],
    steps: int,
    factors: Sequence[float],
    progress: Callable[[str, float], None] = silent,
) -> list[list[np.ndarray]]:
    """Where one optimiser ends on each data set from 0, at each multiple of its learning rate.

    The sets of one shape of weights are padded with zeros to one size and run in one sweep; each
    loss is the mean over the set's own rows, so that no step depends on the others.
    """
    ends: list[list[np.ndarray]] = [[] for _ in sets]
    for shape in dict.fromkeys(s.shape for s in sets):
        here = [i for i, s in enumerate(sets) if s.shape == shape]
        n, d = (max(sets[i].X.shape[axis] for i in here) for axis in (0, 1))
        X, t = np.zeros((len(here), n, d)), np.zeros((len(here), n))
        for k, i in enumerate(here):
            rows, columns = sets[i].X.shape
            X[k, :rows, :columns], t[k, :rows] = sets[i].X, sets[i].t
        counts = np.array([float(len(sets[i].t)) for i in here])
        run = make_run(_squares(X, t, counts, shape), contender.factory, steps, record_every=steps)
        rates = [contender.rate(scales(sets[i].X, sets[i].t, steps)) for i in here]
        points = [
            {"equations": k, "learning_rate": factor * rate}
            for k, rate in enumerate(rates)
            for factor in factors
        ]
        done, part = sum(map(len, ends)) / len(factors) / len(sets), len(here) / len(sets)

        def said(text: str, f: float, done: float = done, part: float = part) -> None:
            progress(text, done + part * f)

        runs = sweep(run, grid.points(points), final=final_weights, progress=said)
        weights = runs.weights.isel(seed=0).values.reshape(len(here), len(factors), -1)
        for k, i in enumerate(here):
            ends[i] = list(weights[k, :, : sets[i].X.shape[1]])
    return ends


def _squares(X: np.ndarray, t: np.ndarray, n: np.ndarray, shape: tuple[int, ...]) -> Problem:
    """½‖X_k w − t_k‖²/n_k from w = 0, a vector or a matrix; k is the hyperparameter "equations"."""
    start = np.zeros(shape or X.shape[2:])
    shared = jax.tree.map(jnp.asarray, {"X": X, "t": t, "n": n, "w0": start})
    return Problem(_start, _loss, _objective, Data((), shared), hparams=frozenset({"equations"}))


def _start(key: Key, data: Data) -> tuple[PyTree, PyTree]:
    return data.shared["w0"], ()


def _loss(w: jax.Array, state: PyTree, batch: Batch, hparams: HParams) -> tuple[jax.Array, PyTree]:
    return _mean_square(w, batch.shared, hparams), state


def _objective(w: jax.Array, state: PyTree, data: Data, hparams: HParams) -> jax.Array:
    return _mean_square(w, data.shared, hparams)


def _mean_square(w: jax.Array, shared: PyTree, hparams: HParams) -> jax.Array:
    k = hparams["equations"].astype(jnp.int32)
    X, t = shared["X"][k], shared["t"][k]
    return 0.5 * jnp.sum((X @ w.ravel() - t) ** 2) / shared["n"][k]


def best_of(given: Equations, ends: Sequence[np.ndarray]) -> tuple[int, float]:
    """Choose the end of least residual; tell how far from it, relatively, others that solve lie."""
    residuals = np.array([given.residual(w) for w in ends])
    best = int(np.argmin(np.nan_to_num(residuals, nan=np.inf)))
    size = float(np.linalg.norm(ends[best])) or 1.0
    solved = [w for w, r in zip(ends, residuals, strict=True) if r <= SOLVED]
    far = [float(np.linalg.norm(w - ends[best])) / size for w in solved]
    return best, max(far) if len(far) > 1 else np.nan


def certified(s: DataSet, w: np.ndarray) -> Certificate:
    """Compare an end with every solution that a bias might pick."""
    return certificate(
        w, s.X, s.t, norms=(2, 1, np.inf, 4 / 3), potentials=[hypentropy(BETA)], tolerance=SOLVED
    )


def _judged(sets: Sequence[DataSet], ends: dict[str, list[np.ndarray]]) -> xr.Dataset:
    """An optimiser's certificates: of its best-converged run, and the spread of them all."""
    rows = []
    for s in sets:
        if s.name not in ends:
            rows.append({})
            continue
        best, spread = best_of(equations(s.X, s.t), ends[s.name])
        w = ends[s.name][best]
        found = certified(s, w)
        rows.append({
            "residual": found.residual,
            "off_row_space": found.off_row_space,
            "test_error": s.error(w),
            "spread": spread,
            **{f"distance {name}": value for name, value in found.distances.items()},
            **{f"ratio {name}": value for name, value in found.norm_ratios.items()},
            "picked": (*found.picked, "none")[0] if found.residual <= SOLVED else "not solved",
            "found": found.found,
        })  # fmt: skip
    names = list(max(rows, key=len))
    columns = {
        name: (
            "data",
            [row.get(name, "" if name in ("found", "picked") else np.nan) for row in rows],
        )
        for name in names
        if not name.startswith(("distance ", "ratio "))
    }
    for kind in ("distance", "ratio"):
        keys = [name.removeprefix(f"{kind} ") for name in names if name.startswith(f"{kind} ")]
        values = [[row.get(f"{kind} {key}", np.nan) for key in keys] for row in rows]
        axis = "solution" if kind == "distance" else "norm"
        columns[kind] = (("data", axis), values)
        columns[axis] = ((axis,), keys)
    return xr.Dataset(columns).set_coords(["solution", "norm"])
