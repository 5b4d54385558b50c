"""Do the closed forms of one gradient step (loss, hypergradient, best rate) match the run?"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from optjax.hypergradients import hypergrad
from optjax.report.claims import Claim, verdict
from optjax.report.rendering import number
from optjax.report.style import COLOURS, MARKERS, caption, figure
from optjax.run.problems import least_squares
from optjax.run.trajectory import make_run
from optjax.support.console import silent
from optjax.support.machine import quick_jit
from optjax.theory import gradient_descent

RATIOS = (0.0, 0.5, 0.9, 1.1, 1.5, 2.5)
"""Learning rates tried, as multiples of η*; not η* itself, where the slope is rounding only."""
MODES = ("one_step", "reverse", "forward")
"""Of `hypergrad`: the source's closed form, and two derivatives through the run."""
SAMPLERS = {"replacement": True, "epochs": False}
"""How a mini-batch is drawn, and whether with replacement."""
Z = 3.5
"""The largest |z| allowed: of a normal variable one in two thousand is larger."""


@dataclass(frozen=True)
class Config:
    """Are L1(η), dL1/dη and η* as the source derives them?

    Command: optjax run one_step. Cost: 6 s on two cores.
    Expect: relative differences of 1e-15 to 1e-12; a golden-section search finds η* to 1e-6; the
    best rate of mini-batches lies within the interval that runs give it.
    """

    seed: int = 0
    """Seed of the random problems."""
    problems: int = 256
    """Random (X, t, w0)."""
    rows: int = 5
    """n, examples."""
    columns: int = 8
    """d, parameters."""
    batch_rows: int = 24
    """n of the problem with mini-batches."""
    batch_sizes: tuple[int, ...] = (1, 2, 6)
    """b, examples of a mini-batch."""
    seeds: int = 4096
    """Mini-batches drawn for each size and rate."""


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
        return xr.merge([_run(config, progress), _batches(config, progress)])


def _run(config: Config, progress: Callable[[str, float], None]) -> xr.Dataset:
    rng = np.random.default_rng(config.seed)
    k, n, d = config.problems, config.rows, config.columns
    X, t, w0 = rng.normal(size=(k, n, d)), rng.normal(size=(k, n)), rng.normal(size=(k, d))

    def one(X, t, w0):
        step = make_run(least_squares(X, t, w0), optax.sgd, 1, sampler="full")
        loss = lambda eta: step({"learning_rate": eta}, jax.random.key(0)).final_loss  # noqa: E731
        best = gradient_descent.optimal_learning_rate(X, t, w0)
        etas, h = jnp.asarray(RATIOS) * best, 0.25 * best

        def slope(mode):
            by = hypergrad(step, mode=mode)
            at = lambda eta: by({"learning_rate": eta}, jax.random.key(0)).gradient  # noqa: E731
            return jax.vmap(at)(etas)["learning_rate"]

        def formula(closed, *more):
            return jax.vmap(lambda eta: closed(X, t, w0, eta, *more))(etas)

        return {
            "loss": jax.vmap(loss)(etas),
            "loss_formula": formula(gradient_descent.one_step_loss),
            "slope": jnp.stack([slope(mode) for mode in MODES], axis=-1),
            "slope_formula": formula(gradient_descent.one_step_hypergradient),
            "slope_basis": formula(gradient_descent.gradient_descent_hypergradient, 1),
            "slope_difference": (jax.vmap(loss)(etas + h) - jax.vmap(loss)(etas - h)) / (2 * h),
            "best": best,
            "best_search": _golden(loss, 4 * best),
            "loss_at_best": loss(best),
            "loss_beside": jax.vmap(loss)(best * jnp.array([0.99, 1.01])),
            "curvature": jax.grad(jax.grad(loss))(best),
        }

    progress("one step", 0.0)
    found = jax.tree.map(np.asarray, quick_jit(jax.vmap(one))(X, t, w0))
    ratios = np.linspace(0, 2.2, 111)
    curve = np.array(
        [
            float(gradient_descent.one_step_loss(X[0], t[0], w0[0], r * found["best"][0]))
            for r in ratios
        ]
    )
    dims = {3: ("problem", "ratio", "mode"), 2: ("problem", "ratio"), 1: ("problem",)}
    data = {name: (dims[v.ndim], v) for name, v in found.items() if name != "loss_beside"}
    data["loss_beside"] = (("problem", "side"), found["loss_beside"])
    return xr.Dataset(
        data | {"curve": ("curve_ratio", curve)},
        {"ratio": list(RATIOS), "mode": list(MODES), "curve_ratio": ratios},
    )


def _batches(config: Config, progress: Callable[[str, float], None]) -> xr.Dataset:
    """One step on a random mini-batch: mean loss and slope over seeds against their expectations.

    Every draw's loss is a parabola in η, so that two slopes give the mean's vertex exactly.
    """
    progress("mini-batches", 0.5)
    rng = np.random.default_rng(config.seed + 1)
    n, d = config.batch_rows, config.columns
    X, t, w0 = rng.normal(size=(n, d)), rng.normal(size=n), rng.normal(size=d)
    rates = np.asarray(gradient_descent.optimal_learning_rate(X, t, w0)) * np.linspace(0.05, 0.8, 9)
    sizes = np.array(config.batch_sizes)
    parts: dict[str, list[np.ndarray]] = {"mean": [], "error": [], "expected": [], "best": []}
    for sampler, replacement in SAMPLERS.items():
        step = make_run(least_squares(X, t, w0), optax.sgd, 1, sampler=sampler)
        slope = hypergrad(step, wrt="learning_rate", mode="one_step")

        def over_seeds(size, eta, slope=slope):
            found = slope.over_seeds({"learning_rate": eta, "batch_size": size}, config.seeds)
            means, errors = (found.value, found.gradient), (found.value_error, found.gradient_error)
            pairs = (jnp.stack([v, by["learning_rate"]]) for v, by in (means, errors))
            return *pairs, found.each.gradient["learning_rate"]

        def exact(size, eta, replacement=replacement):
            drawn = {"batch_size": size, "replacement": replacement}
            loss = lambda eta: gradient_descent.one_step_expected_loss(X, t, w0, eta, **drawn)  # noqa: E731
            closed = gradient_descent.optimal_learning_rate(X, t, w0, **drawn)
            return jnp.stack(jax.value_and_grad(loss)(eta)), closed

        def table(cell):
            return quick_jit(jax.vmap(jax.vmap(cell, (None, 0)), (0, None)))(sizes, rates)

        mean, error, slopes = map(np.asarray, table(over_seeds))
        expected, closed = map(np.asarray, table(exact))
        curvature = (slopes[:, -1] - slopes[:, 0]) / (rates[-1] - rates[0])
        vertex = rates[0] - slopes[:, 0].mean(-1) / curvature.mean(-1)
        # The delta method for a ratio of means: the spread of what is the slope at the vertex.
        left = slopes[:, 0] + curvature * (vertex - rates[0])[:, None]
        spread = left.std(-1, ddof=1) / config.seeds**0.5 / curvature.mean(-1)
        best = np.stack([closed[:, 0], vertex, spread], axis=-1)
        for name, part in zip(parts, (mean, error, expected, best), strict=True):
            parts[name].append(part)
    dims = {
        True: ("sampler", "batch_size", "part"),
        False: ("sampler", "batch_size", "rate", "what"),
    }
    return xr.Dataset(
        {f"batch_{k}": (dims[k == "best"], np.array(v)) for k, v in parts.items()}
        | {"seeds": config.seeds},
        {
            "sampler": list(SAMPLERS),
            "batch_size": sizes,
            "what": ["loss", "slope"],
            "rate": rates,
            "part": ["closed form", "runs", "standard error"],
        },
    )


def figures(dataset: xr.Dataset) -> dict[str, Figure]:
    """L1(η) by formula, with dots by runs and tangents by their hypergradients; mini-batches."""
    fig, (ax, right) = figure("wide", 1, 2, height=3.6)
    first = dataset.isel(problem=0)
    best = float(first.best)
    ax.plot(dataset.curve_ratio * best, dataset.curve, color=COLOURS[0], label="closed form L₁(η)")
    shown = first.sel(ratio=[r for r in RATIOS if r <= 2])
    etas, slopes = shown.ratio.values * best, shown.slope.sel(mode="reverse").values
    for eta, loss, slope in zip(etas, shown.loss.values, slopes, strict=True):
        reach = np.array([-0.16, 0.16]) * best
        ax.plot(eta + reach, loss + slope * reach, color=COLOURS[1], lw=2,
                label="tangent by hypergrad, reverse mode" if eta == etas[0] else None)  # fmt: skip
    ax.plot(etas, shown.loss, "o", color=COLOURS[6], ms=5, label="runs of one step")
    ax.plot(best, first.loss_at_best, "*", color=COLOURS[2], ms=15, label="η* = n‖Xᵀa‖²/2‖XXᵀa‖²")
    ax.set(xlabel="learning rate η", ylabel="loss after one step L₁")
    ax.set_ylim(0, None)
    ax.legend(frameon=False, fontsize=8)
    _batches_panel(right, dataset.sel(sampler="replacement"))
    caption(fig, "The loss after one gradient step is a parabola in the learning rate; the runs, "
            "their hypergradients and η* lie on it. Right: its mean over mini-batches of b "
            "examples, whose noise makes the best rate smaller; lines and stars by the closed "
            "form, bars: 95 %.")  # fmt: skip
    return {"parabola": fig}


def _batches_panel(ax: Axes, dataset: xr.Dataset) -> None:
    for i, size in enumerate(dataset.batch_size.values):
        one, colour = dataset.sel(batch_size=size), COLOURS[i]
        mean, error, expected = (
            one[f"batch_{k}"].sel(what="loss").values for k in ("mean", "error", "expected")
        )
        best = float(one.batch_best[0])
        curve = np.polynomial.Polynomial.fit(dataset.rate.values, expected, 2)
        ax.plot(*curve.linspace(100), color=colour, lw=1.3)
        ax.errorbar(dataset.rate, mean, 1.96 * error, fmt=MARKERS[i], color=colour, ms=4,
                    capsize=3, label=f"b = {size}, mean and 95 %")  # fmt: skip
        ax.plot(best, curve(best), "*", color=colour, ms=14, mec="#222222", mew=0.6)
    ax.plot([], [], "*", color="white", mec="#222222", ms=12, label="η* of that batch size")
    losses = dataset.batch_expected.sel(what="loss").values
    ax.set(xlabel="learning rate η", ylabel="expected loss after one step",
           ylim=(0.9 * losses.min(), 2.5 * losses[0, 0]))  # fmt: skip
    ax.legend(frameon=False, fontsize=8, loc="upper left")


def claims(dataset: xr.Dataset) -> list[Claim]:
    """one-step/loss, /hypergradient, /optimal-learning-rate and /mini-batch-learning-rate."""
    gap = lambda x, y: float((abs(x - y) / abs(y)).max(skipna=False))  # noqa: E731
    loss = gap(dataset.loss, dataset.loss_formula)
    slopes = {mode: dataset.slope.sel(mode=mode) for mode in MODES}
    through = {mode: gap(slopes[mode], dataset.slope_formula) for mode in ("reverse", "forward")}
    basis = gap(slopes["one_step"], dataset.slope_basis)
    difference = gap(dataset.slope_difference, dataset.slope_formula)
    search = gap(dataset.best_search, dataset.best)
    z = abs(dataset.batch_mean - dataset.batch_expected) / dataset.batch_error
    closed, vertex, error = dataset.batch_best.transpose("part", ...).values
    vertex_z = abs(vertex - closed) / error
    cells = [f"{how}, b = {b}" for how in SAMPLERS for b in dataset.batch_size.values]
    best = {
        "closed form": dict(zip(cells, closed.ravel().tolist(), strict=True)),
        "runs": dict(zip(cells, vertex.ravel().tolist(), strict=True)),
    }
    ends = np.stack([vertex - 1.96 * error, vertex + 1.96 * error], axis=-1).reshape(-1, 2)
    interval = {f"η*, {cell}": pair for cell, pair in zip(cells, ends.tolist(), strict=True)}
    beats = float((dataset.loss_beside > dataset.loss_at_best).mean())
    curvature = float(dataset.curvature.min())
    runs = dataset.loss.size

    def claim(
        name, words, statement, source, measured, short, tolerance, n_runs, holds, interval=None
    ):
        return Claim(
            id=f"one-step/{name}",
            statement=statement,
            source=source,
            measured=measured,
            tolerance=tolerance,
            n_runs=n_runs,
            interval=interval,
            verdict=verdict(holds),
            evidence="one_step/parabola",
            plain_words=words,
            measured_short=short,
        )

    return [
        claim(
            "loss",
            "The loss after one gradient step, in closed form",
            "The loss after one step is L1(η) = (1/n)‖(I − (2η/n)XXᵀ)a‖².",
            "L1(η) = (1/n)‖(I − (2η/n)XXᵀ)a‖²",
            {"largest relative difference of run and formula": loss},
            f"as the run, to {number(loss)}",
            "1e-12 relative (float64)",
            runs,
            loss < 1e-12,
        ),
        claim(
            "hypergradient",
            "The derivative of that loss by the rate, in closed form",
            "dL1/dη = −(4/n²)aᵀXXᵀ(I − (2η/n)XXᵀ)a, and derivatives through the run agree.",
            "dL1/dη = −(4/n²)aᵀXXᵀ(I − (2η/n)XXᵀ)a",
            {
                f"largest relative difference of hypergrad's {mode} mode through the run and "
                "the source's formula": value
                for mode, value in through.items()
            }
            | {
                "largest relative difference of hypergrad's one_step mode, which is the source's "
                "formula, and the form of T steps in the SVD basis at T = 1": basis,
                "largest relative difference of central difference and formula": difference,
            },
            f"as derivatives through the run, to {number(max(through.values()))}",
            "1e-12 relative for derivatives, 1e-10 for the central difference (float64)",
            runs,
            all(v < 1e-12 for v in (*through.values(), basis)) and difference < 1e-10,
        ),
        claim(
            "optimal-learning-rate",
            "The rate that makes the loss after one step least",
            "L1 is convex in η and η* = (n/2)‖Xᵀa‖²/‖XXᵀa‖² minimises it.",
            "η* = (n/2)‖Xᵀa‖²/‖XXᵀa‖²",
            {
                "share of neighbours at ±1 % that are worse": beats,
                "smallest second derivative of L1": curvature,
                "largest relative difference from a golden-section search": search,
            },
            f"as found by a search, to {number(search)}",
            "1e-6 relative (a search by values cannot do better than √rounding)",
            dataset.sizes["problem"],
            beats == 1 and curvature > 0 and search < 1e-6,
        ),
        claim(
            "mini-batch-learning-rate",
            "The best rate for one step on a random mini-batch",
            "For a random mini-batch the expected loss after one step is least at "
            "η* = ‖g‖²/(gᵀHg + tr(HC_b)).",
            "beyond the source",
            {
                "largest |z| of the mean loss over mini-batches": float(z.sel(what="loss").max()),
                "largest |z| of the mean hypergradient (one_step, its general form)": float(
                    z.sel(what="slope").max()
                ),
                "η*, closed form": best["closed form"],
                "η*, vertex of the mean over mini-batches": best["runs"],
            },
            f"{vertex_z.size} rates within {number(float(vertex_z.max()), 2)} standard errors of "
            "the formula",
            f"every mean, and every vertex, within {Z} of its standard errors",
            dataset.batch_mean.sel(what="loss").size * int(dataset.seeds),
            bool((z < Z).all() and (vertex_z < Z).all()),
            interval,
        ),
    ]
