"""Two small networks, one linear: where only measurement tells which solution is found."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr

from optjax.experiments.which_solution.contenders import CONTENDERS, Scales
from optjax.run.batching import Batch, masked_mean
from optjax.run.problems import Data, Problem
from optjax.run.trajectory import Run, make_run
from optjax.support.types import HParams, Key, PyTree
from optjax.sweeps import sweep

INPUTS, HIDDEN, EXAMPLES, TESTED = 10, 20, 8, 500
NETWORKS = {"two-layer linear": 1.0, "two-layer ReLU": 0.0}
"""Slope of the activation below 0, of the network and of the one that made the targets."""
SCALES = {"curvature": 4.0, "size": 0.3}
"""Rough scales for learning rates."""
FACTORS = (0.1, 0.3, 1.0)
LEFT_OUT = ("nesterov", "adamw", "natural_gradient", "steepest_l1")
"""Three that end as momentum, adam and mirror_descent do; the last fits in no 2,000 steps."""
FITTED = 0.02
"""Relative training error of a network that fits its examples."""


def predicted(w: PyTree, x: jax.Array, leak: jax.Array) -> jax.Array:
    """Return W₂ φ(W₁x) of each row, φ(a) = max(a, 0) + leak · min(a, 0)."""
    a = x @ w["W1"].T
    return (jnp.maximum(a, 0) + leak * jnp.minimum(a, 0)) @ w["W2"]


def _problem(seed: int, leak: float) -> Problem:
    """½ mean (f(x) − t)², t by a network of three units; initial weights are small."""
    rng = np.random.default_rng(seed)
    teacher = {"W1": rng.normal(size=(3, INPUTS)), "W2": rng.normal(size=3)}
    x = rng.normal(size=(EXAMPLES + TESTED, INPUTS)) / np.sqrt(INPUTS)
    t = np.asarray(predicted(teacher, jnp.asarray(x), jnp.asarray(leak)))
    data = {"x": x[:EXAMPLES], "t": t[:EXAMPLES]}
    shared = {"x": x[EXAMPLES:], "t": t[EXAMPLES:], "leak": np.asarray(leak)}
    return Problem(_init, _loss, _objective, Data(*jax.tree.map(jnp.asarray, (data, shared))))


def _init(key: Key, data: Data) -> tuple[PyTree, PyTree]:
    first, second = jax.random.split(key)
    return {
        "W1": 0.1 * jax.random.normal(first, (HIDDEN, INPUTS)),
        "W2": 0.1 * jax.random.normal(second, (HIDDEN,)),
    }, ()


def _loss(w: PyTree, state: PyTree, batch: Batch, hparams: HParams) -> tuple[jax.Array, PyTree]:
    error = predicted(w, batch.examples["x"], batch.shared["leak"]) - batch.examples["t"]
    return 0.5 * masked_mean(error**2, batch.mask, batch.weights), state


def _objective(w: PyTree, state: PyTree, data: Data, hparams: HParams) -> jax.Array:
    return _loss(w, state, Batch(data.examples, None, jax.random.key(0), data.shared), hparams)[0]


def _ends(w: PyTree, state: PyTree, data: Data) -> dict[str, jax.Array]:
    """Relative errors on both parts, and the share of the linear map W₂W₁ off the row space."""

    def error(part: dict[str, jax.Array]) -> jax.Array:
        off = predicted(w, part["x"], data.shared["leak"]) - part["t"]
        return jnp.linalg.norm(off) / jnp.linalg.norm(part["t"])

    whole = w["W2"] @ w["W1"]
    Q, _ = jnp.linalg.qr(data.examples["x"].T)
    return {
        "network_residual": error(data.examples),
        "network_test_error": error(data.shared),
        "network_off_row_space": jnp.linalg.norm(whole - Q @ (Q.T @ whole))
        / jnp.linalg.norm(whole),
    }


def trained(
    seed: int,
    seeds: int,
    optimizers: Sequence[str],
    steps: int,
    progress: Callable[[str, float], None],
) -> xr.Dataset:
    """Ends of every optimiser on both networks: of the gentlest rate that fits, else the best."""
    problems = [_problem(seed, leak) for leak in NETWORKS.values()]
    found, optimizers = [], [name for name in optimizers if name not in LEFT_OUT]
    for i, name in enumerate(optimizers):
        contender = CONTENDERS[name]
        rate = contender.rate(Scales(**SCALES, steps=steps))

        def make(network: int, factory=contender.factory) -> Run:
            return make_run(problems[network], factory, steps, sampler="full", record_every=steps)

        runs = sweep(
            make,
            {"network": range(len(NETWORKS)), "learning_rate": [f * rate for f in FACTORS]},
            seeds,
            final=_ends,
            progress=lambda text, f, i=i, name=name: progress(
                f"{name} on networks: {text}", 0.5 + 0.5 * (i + f) / len(optimizers)
            ),
        )
        # The gentlest rate that fits, and else what fits best.
        residual = runs.network_residual.fillna(np.inf)
        fits = residual <= FITTED
        best = xr.where(
            fits.any("learning_rate"),
            fits.argmax("learning_rate"),
            residual.argmin("learning_rate"),
        )
        kept = [name for name in runs.data_vars if str(name).startswith("network_")]
        found.append(runs[kept].isel(learning_rate=best).drop_vars("learning_rate"))
    if not found:
        return xr.Dataset()
    return xr.concat(found, "optimizer").assign_coords(
        network=list(NETWORKS), optimizer=list(optimizers)
    )
