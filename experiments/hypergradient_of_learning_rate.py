"""Do all ways of differentiating a run agree with closed forms, and what is it that they see?"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from optjax.hypergradients import ES, Hypergradient, Truncated, hypergrad
from optjax.report.claims import Claim, verdict
from optjax.report.rendering import number
from optjax.report.style import COLOURS, MARKERS, caption, figure
from optjax.run.problems import least_squares
from optjax.run.trajectory import Run, make_run
from optjax.support.console import silent
from optjax.support.errors import UserError
from optjax.support.machine import quick_jit
from optjax.theory import gradient_descent

LOOK = {
    "forward": (COLOURS[0], MARKERS[0]),
    "reverse": (COLOURS[1], MARKERS[1]),
    "segmented": (COLOURS[2], MARKERS[2]),
    "recursive": (COLOURS[3], MARKERS[3]),
    "auto": ("#777777", MARKERS[4]),
    "truncated": (COLOURS[4], MARKERS[5]),
    "one_step": (COLOURS[5], MARKERS[6]),
    "difference": (COLOURS[6], MARKERS[7]),
}
LABELS = {"truncated": "truncated, × T/k", "difference": "central difference of values"}
SHARES = (0.1, 0.3, 0.6, 0.9, 1.05)
"""Learning rates in units of 2/λ_max, above which gradient descent is unstable."""
Z = 3.5
"""The largest |z| allowed: of a normal variable one in two thousand is larger."""


@dataclass(frozen=True)
class Config:
    """Do all modes of `hypergrad` give dL_T/dη, and how does the loss depend on η?

    Command: optjax run hypergradient_of_learning_rate. Cost: 20 s on two cores; --full 25 s.
    Expect: exact modes within 1e-11 of the closed form, central differences within 1e-6, estimates
    within their standard errors; the best rate grows with T, up to 2/λ_max.
    """

    seed: int = 0
    """Seed of the problems and of what is drawn."""
    problems: int = 24
    """Random problems, each with five rates."""
    rows: int = 6
    """n, examples of the agreement and the surface; columns are two more."""
    steps: tuple[int, ...] = (1, 10, 100)
    """T, steps of a run."""
    pairs: int = 64
    """Antithetic pairs of the evolution strategy."""
    seeds: int = 512
    """Runs with mini-batches at each rate."""
    batch_size: int = 4
    """b of them, of 32 examples."""
    batch_steps: int = 20
    """T of them."""


FULL = {
    "problems": 64,
    "steps": (1, 10, 100, 1000),
    "pairs": 128,
    "seeds": 1024,
}
"""The sizes of RESULTS.md."""


def run(config: Config, progress: Callable[[str, float], None] = silent) -> xr.Dataset:
    """Slopes by every mode and closed form; the surface; mini-batches."""
    if not config.steps or min(config.steps) < 1 or config.problems < 2:
        raise UserError("expected at least one number of steps, each above 0, and two problems")
    with jax.enable_x64(True):
        problems = draw(config.seed, config.problems, 30.0, (config.rows, config.rows + 2))
        parts = [_agreement(config, problems, progress)]
        progress("surface", 0.7)
        parts.append(_surface(config, tuple(a[:1] for a in problems)))
        progress("mini-batches", 0.9)
        parts.append(_batches(config))
        return xr.merge(parts)


def draw(seed: int, problems: int, spread: float, shape: tuple[int, int]) -> Any:
    """X, t, w0: random bases, targets of a teacher; the curvatures are 1 … 1/spread²."""
    rng, (n, d) = np.random.default_rng(seed), shape
    left, right = (np.linalg.qr(rng.normal(size=(problems, k, k)))[0] for k in (n, d))
    k = min(n, d)
    values = np.sqrt(n / 2) * np.geomspace(1, 1 / spread, k)
    X = np.einsum("pik,k,pjk->pij", left[:, :, :k], values, right[:, :, :k])
    teacher, w0 = rng.normal(size=(2, problems, d))
    return X, np.einsum("pij,pj->pi", X, teacher), w0


def _descent(X: Any, t: Any, w0: Any, steps: int) -> Run:
    return make_run(least_squares(X, t, w0), optax.sgd, steps, sampler="full")


def _slopes(mode: Any, steps: int, problems: Any, etas: Any, seed: int = 0) -> Hypergradient:
    """Hypergradients by the learning rate, (problem, rate)."""

    def one(X, t, w0, eta, key):
        return hypergrad(_descent(X, t, w0, steps), mode=mode)({"learning_rate": eta}, key)

    keys = jax.random.split(jax.random.key(seed), etas.shape)
    return jax.vmap(jax.vmap(one, (None, None, None, 0, 0)))(*problems, etas, keys)


def _closed(what: Callable[..., Any], steps: int, problems: Any, etas: Any) -> np.ndarray:
    over = jax.vmap(lambda X, t, w0, eta: what(X, t, w0, eta, steps), (None, None, None, 0))
    return np.asarray(quick_jit(jax.vmap(over))(*problems, etas))


def _agreement(config: Config, problems: Any, progress: Any) -> xr.Dataset:
    etas = np.broadcast_to(2 * np.array(SHARES), (config.problems, len(SHARES)))
    names = list(LOOK)
    found = np.full((len(names), len(config.steps), *etas.shape), np.nan)
    exact, chosen = np.empty(found.shape[1:]), []
    some = slice(24)
    es = np.empty((3, len(config.steps), *etas[some].shape))
    nodes, weights = np.polynomial.hermite_e.hermegauss(40)
    for i, T in enumerate(config.steps):
        progress(f"{T} steps", 0.7 * i / len(config.steps))
        exact[i] = _closed(gradient_descent.gradient_descent_hypergradient, T, problems, etas)
        k = max(1, T // 4)
        for j, name in enumerate(names[:-1]):
            if name == "one_step" and T > 1:
                continue
            mode = Truncated(k) if name == "truncated" else name
            found[j, i] = _slopes(mode, T, problems, etas).gradient["learning_rate"]
            # Its own closed form: k of T equal factors are differentiated.
            found[j, i] *= T / k if name == "truncated" else 1
        found[-1, i] = _difference(T, problems, etas)
        descent = _descent(*(a[0] for a in problems), T)
        chosen.append(hypergrad(descent).explain({"learning_rate": 1.0}).mode.name)

        sigma, few, at = 0.1 / T, tuple(a[some] for a in problems), etas[some]
        mode = ES(config.pairs, sigma, config.pairs)
        estimate = _slopes(mode, T, few, at, seed=config.seed + T)
        es[0, i] = estimate.gradient["learning_rate"]
        es[1, i] = estimate.aux["standard_error"]["learning_rate"]
        moved = (at[..., None] * (1 + sigma * nodes)).reshape(len(at), -1)
        slope = _closed(gradient_descent.gradient_descent_hypergradient, T, few, moved)
        es[2, i] = slope.reshape(*at.shape, -1) @ weights / weights.sum()
    dims = ("steps", "problem", "share")
    return xr.Dataset(
        {
            "slope": (("mode", *dims), found),
            "exact": (dims, exact),
            "es": (("part", "steps", "es_problem", "share"), es),
            "chosen": ("steps", chosen),
        },
        {
            "mode": names,
            "steps": list(config.steps),
            "share": list(SHARES),
            "part": ["mean", "standard error", "smoothed closed form"],
        },
    )


def _difference(T: int, problems: Any, etas: Any) -> np.ndarray:
    """Five-point central differences of the runs' losses; L_T changes over a length of η/T."""
    h = 3e-3 * etas / T

    def loss(X, t, w0, eta):
        return _descent(X, t, w0, T)({"learning_rate": eta}, jax.random.key(0)).final_loss

    losses = quick_jit(jax.vmap(jax.vmap(loss, (None, None, None, 0))))
    up, down, up2, down2 = (losses(*problems, etas + j * h) for j in (1, -1, 2, -2))
    return np.asarray(8 * (up - down) - (up2 - down2)) / (12 * h)


def _surface(config: Config, problem: Any) -> xr.Dataset:
    """L_T(η) and its slope by the closed form on fine rates, and by hypergradients on a few."""
    fine = np.union1d(np.geomspace(5e-3, 0.4, 300), np.linspace(0.4, 1.2, 1601))
    rates = np.array([0.012, 0.025, 0.05, 0.1, 0.2, 0.4, 0.7, 0.93, 1.0, 1.06, 1.12])
    closed = gradient_descent.gradient_descent_loss, gradient_descent.gradient_descent_hypergradient
    lines = [[_closed(f, T, problem, 2 * fine[None])[0] for f in closed] for T in config.steps]
    dots = [_slopes("reverse", T, problem, 2 * rates[None]) for T in config.steps]
    points = [[d.value[0], d.gradient["learning_rate"][0]] for d in dots]
    return xr.Dataset(
        {
            "surface": (("steps", "what", "fine"), np.array(lines)),
            "tangents": (("steps", "what", "rate"), np.array(points)),
        },
        {"steps": list(config.steps), "what": ["loss", "slope"], "fine": fine, "rate": rates},
    )


def _expected_loss(X: Any, t: Any, w0: Any, eta: Any, steps: int, size: int) -> Any:
    """E L_T under batches drawn with replacement: m = E δ and S = E δδᵀ of δ = w − w*, exactly."""
    n = X.shape[0]
    w_star = jnp.linalg.lstsq(X, t)[0]
    e, H = X @ w_star - t, 2 / n * X.T @ X

    def squares(m, S):
        """E (xᵢᵀw − tᵢ)², (n,)."""
        return jnp.einsum("ni,ij,nj->n", X, S, X) + 2 * e * (X @ m) + e**2

    def step(carry, _):
        m, S = carry
        one = 4 / n * jnp.einsum("n,ni,nj->ij", squares(m, S), X, X)  # E gᵢgᵢᵀ
        S = S - eta * (H @ S + S @ H) + eta**2 * (one / size + (1 - 1 / size) * (H @ S @ H))
        return (m - eta * (H @ m), S), None

    start = w0 - w_star
    (m, S), _ = jax.lax.scan(step, (start, jnp.outer(start, start)), None, length=steps)
    return jnp.mean(squares(m, S))


def _batches(config: Config) -> xr.Dataset:
    """Means over seeds and their exact expectations, at rates where rare runs are not all of it."""
    X, _, w0 = (a[0] for a in draw(config.seed, 1, 3.0, (32, 4)))
    t, w0 = np.random.default_rng(config.seed + 1).normal(size=32), w0 / 3
    T, b = config.batch_steps, config.batch_size
    slope = hypergrad(make_run(least_squares(X, t, w0), optax.sgd, T, max_batch_size=b))
    closed = gradient_descent.gradient_descent_loss, gradient_descent.gradient_descent_hypergradient

    def one(eta):
        found = slope.over_seeds({"learning_rate": eta}, config.seeds)
        mean, error = found.gradient["learning_rate"], found.gradient_error["learning_rate"]
        expected = jax.value_and_grad(_expected_loss, 3)(X, t, w0, eta, T, b)
        whole = [f(X, t, w0, eta, T) for f in closed]
        pairs = ((found.value, mean), (found.value_error, error), expected, whole)
        return [jnp.stack(pair) for pair in pairs]

    shares = np.linspace(0.02, 0.3, 15)
    rows = quick_jit(jax.vmap(one))(2 * shares)
    return xr.Dataset(
        {"batches": (("number", "batch_share", "what"), np.array(rows))},
        {
            "batch_share": shares,
            "number": ["mean", "error", "expected", "whole"],
            "what": ["loss", "slope"],
        },
    )


def figures(dataset: xr.Dataset) -> dict[str, Figure]:
    """Errors of all modes; the loss surface with tangents; mini-batches."""
    with np.errstate(over="ignore", invalid="ignore"):
        return {
            "agreement": _agreement_figure(dataset),
            "surface": _surface_figure(dataset),
            "mini-batches": _batches_figure(dataset),
        }


def _es(dataset: xr.Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Z of every estimate, and of their mean in units of what they should be, for each T."""
    mean, error, exact = dataset.es.values.reshape(3, dataset.sizes["steps"], -1)
    ratio = mean / exact - 1
    return (mean - exact) / error, ratio.mean(1) / (ratio.std(1, ddof=1) / ratio.shape[1] ** 0.5)


def epsilon(ax: Axes) -> None:
    """Where no error is less."""
    ax.axhline(np.finfo(float).eps, color="#222222", lw=1, ls="--")
    ax.text(0.99, 1.7e-16, "machine epsilon", transform=ax.get_yaxis_transform(), fontsize=8,
            ha="right", va="top")  # fmt: skip


def _agreement_figure(dataset: xr.Dataset) -> Figure:
    fig, axes = figure("wide", 1, 2, height=3.9, width_ratios=(1.9, 1))
    (ax, right), steps = axes, dataset.steps.values
    errors = np.maximum(abs(dataset.slope / dataset.exact - 1), 1e-17)
    for i, (name, (colour, marker)) in enumerate(LOOK.items()):
        x = steps * 1.13 ** (i - len(LOOK) / 2)
        runs = errors.sel(mode=name).stack(run=("problem", "share"))
        middle, top = runs.median("run"), runs.max("run")
        ax.vlines(x, middle, top, color=colour, lw=1.2)
        ax.plot(x, top, "_", color=colour, ms=6)
        ax.plot(x, middle, marker, color=colour, ms=5.5, mec="#222222", mew=0.4,
                label=LABELS.get(name, name))  # fmt: skip
    epsilon(ax)
    ax.set(yscale="log", ylim=(2e-17, 1e-4), ylabel="relative error of dL/dη after T steps")
    ax.set_title("exact modes", fontsize=10)

    each, pooled = _es(dataset)
    right.axhspan(-1.96, 1.96, color="#bbbbbb", alpha=0.35, lw=0)
    jitter = 10 ** np.random.default_rng(0).uniform(-0.18, 0.18, each.shape)
    right.plot((steps[:, None] * jitter).ravel(), each.ravel(), ".", color=COLOURS[5], ms=3.5,
               label="an estimate")  # fmt: skip
    right.plot(steps, pooled, MARKERS[3], color=COLOURS[1], ms=7, label="all together")
    right.set(ylabel="error in standard errors, z", ylim=(-5, 7))
    right.set_title("evolution strategy (es)", fontsize=10)
    for ax in axes:
        ax.set(xscale="log", xlabel="steps T of the run")
        ax.set_xticks(steps, [str(T) for T in steps])
        ax.set_xticks([], minor=True)
        ax.legend(frameon=False, fontsize=8, ncols=2, loc="upper left")
    return caption(fig, "Every mode gives the closed form of dL/dη, up to the rounding of T steps "
                   "or, for es, its own noise. Left: random problems and rates on both sides of "
                   "stability; markers: medians, bars: up to the largest. Right: es against the "
                   "closed form smoothed as es smooths; grey: 95 % of a normal z.")  # fmt: skip


def _surface_figure(dataset: xr.Dataset) -> Figure:
    fig, (left, right) = figure("wide", 1, 2, height=4.3)
    fine, rates = dataset.fine.values, dataset.rate.values
    for i, T in enumerate(dataset.steps.values):
        colour, here = COLOURS[i % len(COLOURS)], dataset.sel(steps=T)
        (loss, slope), (foot, tangent) = here.surface.values, here.tangents.values
        left.plot(fine, loss, color=colour, lw=2.8, alpha=0.65, label=f"T = {T}")
        # Straight in logarithms, of one length on paper, where 2.2 decades are as wide as 6 high.
        by = 2 * rates * tangent / foot
        reach = 0.055 / np.hypot(1, 2.2 / 6 * by) * np.array([[-1], [1]])
        left.plot(rates * 10**reach, foot * 10 ** (reach * by), color="#222222", lw=1.4)
        least = int(np.argmin(loss))
        left.plot(fine[least], loss[least], "*", color=colour, ms=13, mec="#222222", mew=0.6)
        right.plot(fine, 2 * fine * np.abs(slope), color=colour, lw=1.3)
        for sign, fill in ((-1, colour), (1, "white")):
            at = np.sign(tangent) == sign
            right.plot(rates[at], (2 * rates * np.abs(tangent))[at], "o", ms=5, color=colour,
                       mfc=fill)  # fmt: skip
    left.plot([], [], color="#222222", lw=1.4, label="tangent by hypergrad")
    left.plot([], [], "*", color="white", mec="#222222", ms=11, ls="", label="best rate η*")
    start = float(dataset.surface[:, 0, 0].max())
    left.set(xscale="log", xlim=(0.0075, 1.3), ylim=(1e-4 * start, 1e2 * start),
             ylabel="loss after T steps L")  # fmt: skip
    for fill, words in (("#222222", "a larger rate is better"), ("white", "a smaller one is")):
        right.plot([], [], "o", ls="", color="#222222", mfc=fill, ms=5, label=words)
    right.set(ylabel="|η dL/dη| (units of the loss)", ylim=(1e-5 * start, 1e11 * start))
    for ax in (left, right):
        ax.axvline(1, color="#777777", lw=1.2, ls=":")
        ax.set(yscale="log", xlabel="learning rate η (units of 2/λ_max)")
        ax.legend(frameon=False, fontsize=8, loc="upper left")
    return caption(fig, "The best rate for one step is not the best for many, which lies just "
                   "below 2/λ_max (dotted), and past it the slope explodes. One problem. Left: "
                   "the loss after T steps by the closed form and, on it, the slope that hypergrad "
                   "gives (reverse mode). Right: the slope for the same T, dots by hypergrad and "
                   "lines by the closed form.")  # fmt: skip


def _batches_figure(dataset: xr.Dataset) -> Figure:
    fig, axes = figure("wide", 1, 2, height=3.6)
    x = dataset.batch_share.values
    words = {"loss": "loss after the last step L", "slope": "its slope dL/dη (loss / rate)"}
    for ax, (what, label) in zip(axes, words.items(), strict=True):
        mean, error, expected, whole = dataset.batches.sel(what=what).values
        ax.plot(x, whole, "--", color=COLOURS[1], label="all examples in every step")
        ax.plot(x, expected, color=COLOURS[0], label="mini-batches, exact expectation")
        ax.errorbar(x, mean, 1.96 * error, fmt="o", color=COLOURS[6], ms=3.5, capsize=3, lw=1.2,
                    label="mean over seeds and 95 %")  # fmt: skip
        ax.set(xlabel="learning rate η (units of 2/λ_max)", ylabel=label)
    axes[1].axhline(0, color="#777777", lw=0.8)
    axes[0].legend(frameon=False, fontsize=8)
    return caption(fig, "With mini-batches the mean hypergradient over seeds is the slope of the "
                   "expected loss. It turns upward at a far smaller rate than with all "
                   "examples.")  # fmt: skip


def claims(dataset: xr.Dataset) -> list[Claim]:
    """hypergradient/modes-agree."""
    errors = abs(dataset.slope / dataset.exact - 1)
    # Only one_step leaves out runs, those of several steps.
    full = bool(errors.drop_sel(mode="one_step").notnull().all())
    worst = errors.max(("steps", "problem", "share"))
    exact = full and bool((worst < np.where(dataset["mode"] == "difference", 1e-6, 1e-10)).all())
    each, pooled = _es(dataset)
    mean, error, expected, _ = dataset.batches.values
    z = float(abs((mean - expected) / error).max())
    steps = [str(T) for T in dataset.steps.values]
    best = dataset.fine.values[dataset.surface.sel(what="loss").argmin("fine").values]
    measured: dict[str, Any] = {
        f"{LABELS.get(name, name)}: largest relative error": float(worst.sel(mode=name))
        for name in LOOK
    } | {
        "auto chose, for each T": dict(zip(steps, dataset.chosen.values.tolist(), strict=True)),
        "es: z of all estimates, for each T": dict(zip(steps, pooled.tolist(), strict=True)),
        "es: share of estimates within 1.96 standard errors": float((abs(each) < 1.96).mean()),
        "mini-batches: largest |z| of the mean loss and the mean hypergradient": z,
        "best rate in units of 2/λ_max, for each T": dict(zip(steps, best.tolist(), strict=True)),
    }
    modes = Claim(
        id="hypergradient/modes-agree",
        statement="Every exact mode gives the closed form of dL/dη after T steps, on both sides of "
        "stability; evolution strategies and means over seeds do within their standard errors.",
        source="beyond the source",
        measured=measured,
        tolerance="against the closed form in the SVD basis: 1e-10 relative (float64), central "
        "differences 1e-6; one_step is the source's formula; truncated against k/T of the closed "
        f"form; es and means over seeds against exact expectations, |z| < {Z}",
        n_runs=int(dataset.slope.count()) + each.size,
        interval=None,
        verdict=verdict(exact and bool((abs(pooled) < Z).all()) and z < Z, reasoning=exact),
        evidence="hypergradient_of_learning_rate/agreement",
        plain_words="Every mode of hypergradient gives the closed form",
        measured_short=f"error ≤ {number(float(worst.drop_sel(mode='difference').max()))}; es and "
        f"means over seeds |z| ≤ {number(max(z, float(abs(pooled).max())), 2)}",
    )
    return [modes]
