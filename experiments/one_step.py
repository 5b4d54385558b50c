"""Do the closed forms of one gradient step (loss, hypergradient, best rate) match the run?"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax
import xarray as xr
from matplotlib.figure import Figure

from optjax import linear
from optjax.console import silent
from optjax.problems import least_squares
from optjax.report.claims import Claim, verdict
from optjax.report.style import COLOURS, caption, figure
from optjax.trajectory import make_run

RATIOS = (0.0, 0.5, 0.9, 1.1, 1.5, 2.5)
"""Learning rates tried, as multiples of η*; not η* itself, where the slope is rounding only."""


@dataclass(frozen=True)
class Config:
    """Are L1(η), dL1/dη and η* as the source derives them?

    Command: optjax run one_step. Cost: 3 s on two cores.
    Expect: relative differences of 1e-15 to 1e-12; a golden-section search finds η* to 1e-6.
    """

    seed: int = 0
    """Seed of the random problems."""
    problems: int = 256
    """Random (X, t, w0)."""
    rows: int = 5
    """n, examples."""
    columns: int = 8
    """d, parameters."""


def _golden(f: Callable[[jax.Array], jax.Array], high: jax.Array, steps: int = 60) -> jax.Array:
    """The minimiser of a unimodal f on (0, high) by golden-section search: values only."""
    g = (np.sqrt(5.0) - 1) / 2

    def shrink(_, ends):
        low, top = ends
        c, d = top - g * (top - low), low + g * (top - low)
        left = f(c) < f(d)
        return jnp.where(left, low, c), jnp.where(left, d, top)

    low, top = jax.lax.fori_loop(0, steps, shrink, (jnp.zeros_like(high), high))
    return (low + top) / 2


def run(config: Config, progress: Callable[[str, float], None] = silent) -> xr.Dataset:
    """Loss, slope and best rate, by closed form and by the run, for every problem and rate."""
    with jax.enable_x64(True):
        return _run(config, progress)


def _run(config: Config, progress: Callable[[str, float], None]) -> xr.Dataset:
    rng = np.random.default_rng(config.seed)
    k, n, d = config.problems, config.rows, config.columns
    X, t, w0 = rng.normal(size=(k, n, d)), rng.normal(size=(k, n)), rng.normal(size=(k, d))

    def one(X, t, w0):
        step = make_run(least_squares(X, t, w0), optax.sgd, 1, sampler="full")
        loss = lambda eta: step({"learning_rate": eta}, jax.random.key(0)).final_loss  # noqa: E731
        best = linear.optimal_learning_rate(X, t, w0)
        etas, h = jnp.asarray(RATIOS) * best, 0.25 * best
        closed = jax.vmap(lambda eta: linear.one_step_loss(X, t, w0, eta))
        return {
            "loss": jax.vmap(loss)(etas),
            "loss_formula": closed(etas),
            "slope": jax.vmap(jax.grad(loss))(etas),
            "slope_formula": jax.vmap(lambda e: linear.one_step_hypergradient(X, t, w0, e))(etas),
            "slope_difference": (jax.vmap(loss)(etas + h) - jax.vmap(loss)(etas - h)) / (2 * h),
            "best": best,
            "best_search": _golden(loss, 4 * best),
            "loss_at_best": loss(best),
            "loss_beside": jax.vmap(loss)(best * jnp.array([0.99, 1.01])),
            "curvature": jax.grad(jax.grad(loss))(best),
        }

    progress("one step", 0.0)
    found = jax.tree.map(np.asarray, jax.jit(jax.vmap(one))(X, t, w0))
    ratios = np.linspace(0, 2.2, 111)
    curve = np.array(
        [float(linear.one_step_loss(X[0], t[0], w0[0], r * found["best"][0])) for r in ratios]
    )
    dims = {2: ("problem", "ratio"), 1: ("problem",)}
    data = {name: (dims[v.ndim], v) for name, v in found.items() if name != "loss_beside"}
    data["loss_beside"] = (("problem", "side"), found["loss_beside"])
    return xr.Dataset(
        data | {"curve": ("curve_ratio", curve)}, {"ratio": list(RATIOS), "curve_ratio": ratios}
    )


def figures(dataset: xr.Dataset) -> dict[str, Figure]:
    """L1(η) of the first problem: curve by formula, dots by runs, tangents by jax.grad."""
    fig, ax = figure("single", height=3.6)
    first = dataset.isel(problem=0)
    best = float(first.best)
    ax.plot(dataset.curve_ratio * best, dataset.curve, color=COLOURS[0], label="closed form L₁(η)")
    shown = first.sel(ratio=[r for r in RATIOS if r <= 2])
    etas = shown.ratio.values * best
    for eta, loss, slope in zip(etas, shown.loss.values, shown.slope.values, strict=True):
        reach = np.array([-0.16, 0.16]) * best
        ax.plot(eta + reach, loss + slope * reach, color=COLOURS[1], lw=2,
                label="tangent by jax.grad of the run" if eta == etas[0] else None)  # fmt: skip
    ax.plot(etas, shown.loss, "o", color=COLOURS[6], ms=5, label="runs of one step")
    ax.plot(best, first.loss_at_best, "*", color=COLOURS[2], ms=15, label="η* = n‖Xᵀa‖²/2‖XXᵀa‖²")
    ax.set(xlabel="learning rate η", ylabel="loss after one step L₁")
    ax.set_ylim(0, None)
    ax.legend(frameon=False, fontsize=8)
    caption(fig, "The loss after one gradient step is a parabola in the learning rate; the runs, "
            "their gradients and η* lie on it.")  # fmt: skip
    return {"parabola": fig}


def claims(dataset: xr.Dataset) -> list[Claim]:
    """one-step/loss, one-step/hypergradient and one-step/optimal-learning-rate."""
    gap = lambda x, y: float((abs(x - y) / abs(y)).max())  # noqa: E731
    loss = gap(dataset.loss, dataset.loss_formula)
    slope = gap(dataset.slope, dataset.slope_formula)
    difference = gap(dataset.slope_difference, dataset.slope_formula)
    search = gap(dataset.best_search, dataset.best)
    beats = float((dataset.loss_beside > dataset.loss_at_best).mean())
    curvature = float(dataset.curvature.min())
    runs = dataset.loss.size

    def claim(name, statement, source, measured, tolerance, n_runs, holds):
        return Claim(
            id=f"one-step/{name}",
            statement=statement,
            source=source,
            measured=measured,
            tolerance=tolerance,
            n_runs=n_runs,
            interval=None,
            verdict=verdict(holds),
            evidence="one_step/parabola",
        )

    return [
        claim(
            "loss",
            "The loss after one step is L1(η) = (1/n)‖(I − (2η/n)XXᵀ)a‖².",
            "L1(η) = (1/n)‖(I − (2η/n)XXᵀ)a‖²",
            {"largest relative difference of run and formula": loss},
            "1e-12 relative (float64)",
            runs,
            loss < 1e-12,
        ),
        claim(
            "hypergradient",
            "dL1/dη = −(4/n²)aᵀXXᵀ(I − (2η/n)XXᵀ)a, and jax.grad through the run agrees.",
            "dL1/dη = −(4/n²)aᵀXXᵀ(I − (2η/n)XXᵀ)a",
            {
                "largest relative difference of jax.grad and formula": slope,
                "largest relative difference of central difference and formula": difference,
            },
            "1e-12 relative for jax.grad, 1e-10 for the central difference (float64)",
            runs,
            slope < 1e-12 and difference < 1e-10,
        ),
        claim(
            "optimal-learning-rate",
            "L1 is convex in η and η* = (n/2)‖Xᵀa‖²/‖XXᵀa‖² minimises it.",
            "η* = (n/2)‖Xᵀa‖²/‖XXᵀa‖²",
            {
                "share of neighbours at ±1 % that are worse": beats,
                "smallest second derivative of L1": curvature,
                "largest relative difference from a golden-section search": search,
            },
            "1e-6 relative (a search by values cannot do better than √rounding)",
            dataset.sizes["problem"],
            beats == 1 and curvature > 0 and search < 1e-6,
        ),
    ]
