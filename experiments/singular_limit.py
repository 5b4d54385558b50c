"""What is the derivative of a solution where the Hessian is singular?"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax
import xarray as xr
from matplotlib.figure import Figure

from optjax.experiments.hypergradient_of_learning_rate import draw, epsilon
from optjax.hypergradients import Hypergradient, hypergrad
from optjax.report.claims import Claim, verdict
from optjax.report.rendering import number
from optjax.report.style import COLOURS, MARKERS, caption, figure
from optjax.run.problems import least_squares
from optjax.run.trajectory import make_run
from optjax.support.console import silent
from optjax.support.errors import UserError


@dataclass(frozen=True)
class Config:
    """Does implicit mode give dw/dλ with more parameters than examples, down to λ = 0?

    Command: optjax run singular_limit. Cost: 2 s on two cores.
    Expect: −Xᵀ(XXᵀ + λI)⁻²t to rounding, at λ = 0, too.
    """

    seed: int = 0
    """Seed of the problems."""
    problems: int = 64
    """Random problems."""
    rows: int = 6
    """n, examples; columns are two more."""
    penalties: tuple[float, ...] = tuple(10.0**k for k in range(-8, 1))
    """λ, beside 0."""


def run(config: Config, progress: Callable[[str, float], None] = silent) -> xr.Dataset:
    """The derivative along a direction: closed form, implicit, through the run, a dense solve."""
    if config.problems < 1 or len(config.penalties) < 2:
        raise UserError("expected at least one problem and two penalties")
    progress("both modes", 0.1)
    with jax.enable_x64(True):
        return _limit(config)


def _limit(config: Config) -> xr.Dataset:
    """V · dw/dλ at the minimum of ‖Xw − t‖² + λ‖w‖², more parameters than examples."""
    n, d = shape = config.rows, config.rows + 2
    X, t, _ = draw(config.seed, config.problems, 3.0, shape)
    penalties = np.array([0.0, *sorted(config.penalties)])
    v = np.random.default_rng(config.seed + 1).normal(size=d)

    def slopes(mode: str) -> Hypergradient:
        def one(X, t, penalty):
            descent = make_run(least_squares(X, t, scale=n), optax.sgd, 600, sampler="full")
            # Half of what the curvature 2(σ² + λ) allows, for the largest σ² = n/2.
            hparams = {"learning_rate": 1 / (n + 2 * penalty), "l2": penalty}
            along = lambda trajectory: jnp.dot(v, trajectory.params)  # noqa: E731
            return hypergrad(descent, along, "l2", mode)(hparams, jax.random.key(0))

        return jax.vmap(jax.vmap(one, (None, None, 0)), (0, 0, None))(X, t, penalties)

    implicit, through = slopes("implicit"), slopes("segmented")
    inverse = np.linalg.inv(X @ X.transpose(0, 2, 1) + penalties[:, None, None, None] * np.eye(n))
    w = np.einsum("pnd,lpnm,pm->lpd", X, inverse, t)
    exact = -np.einsum("d,pnd,lpnm,lpmk,pk->pl", v, X, inverse, inverse, t)
    square = X.transpose(0, 2, 1) @ X + penalties[1:, None, None, None] * np.eye(d)
    dense = np.full(exact.shape, np.nan)  # none at λ = 0, where the matrix has no inverse
    dense[:, 1:] = -np.einsum("d,lpd->pl", v, np.linalg.solve(square, w[1:, ..., None])[..., 0])
    found = {
        "exact": exact,
        "implicit": implicit.gradient["l2"],
        "through": through.gradient["l2"],
        "dense": dense,
        "residual": implicit.aux["residual"],
    }
    return xr.Dataset(
        {f"limit_{k}": (("problem", "penalty"), np.asarray(a)) for k, a in found.items()},
        {"penalty": penalties},
    )


def figures(dataset: xr.Dataset) -> dict[str, Figure]:
    """The derivative down to λ = 0, and its errors."""
    fig, (left, right) = figure("wide", 1, 2, height=3.7)
    x = dataset.penalty.values.copy()
    x[0] = x[1] / 10  # where λ = 0 is drawn
    ratios = [dataset[f"limit_{k}"] / dataset.limit_exact[:, 0] for k in ("exact", "implicit")]
    for i, (exact, found) in enumerate(zip(*(r.values[:4] for r in ratios), strict=True)):
        left.plot(x, exact, color=COLOURS[i], lw=1.3)
        left.plot(x, found, MARKERS[i], color=COLOURS[i], ms=5)
    left.axhline(1, color="#222222", lw=1, ls="--")
    left.text(x[1], 0.97, "limit: −Xᵀ(XXᵀ)⁻²t, minimum norm", fontsize=8, va="top")
    left.plot([], [], color="#222222", lw=1.3, label="closed form, four problems")
    left.plot([], [], "o", ls="", color="#222222", ms=5, label="mode implicit")
    left.set(ylabel="v · dw/dλ, relative to its limit")
    left.legend(frameon=False, fontsize=8, loc="lower left")
    words = {
        "implicit": "implicit",
        "through": "segmented, through the run",
        "dense": "dense solve with XᵀX + λI",
    }
    for i, (name, label) in enumerate(words.items()):
        error = np.maximum(abs(dataset[f"limit_{name}"] / dataset.limit_exact - 1), 1e-17)
        middle, top = error.median("problem"), error.max("problem")
        right.plot(x, middle, "-" + MARKERS[i], color=COLOURS[i], ms=4.5, label=label)
        right.fill_between(x, middle, top, color=COLOURS[i], alpha=0.18, lw=0)
    epsilon(right)
    right.set(yscale="log", ylabel="relative error of v · dw/dλ", ylim=(2e-17, 1e-5))
    right.legend(frameon=False, fontsize=8, loc="upper right")
    shown = range(2, len(x), 2)
    for ax in (left, right):
        ax.set(xscale="log", xlabel="penalty λ of ‖Xw − t‖² + λ‖w‖²")
        ax.set_xticks(x[[0, *shown]], ["0", *(f"$10^{{{np.log10(x[i]):.0f}}}$" for i in shown)])
        ax.set_xticks([], minor=True)
    caption(fig, "With more parameters than examples, mode implicit gives the derivative of the "
            "solution by the penalty λ down to λ = 0, where the Hessian is singular. Left: along "
            "a random direction v. Right: errors over all problems, lines: medians, bands: up to "
            "the largest; a dense solve loses digits as 1/λ.")  # fmt: skip
    return {"limit": fig}


def claims(dataset: xr.Dataset) -> list[Claim]:
    """hypergradient/singular-limit."""
    gap = {
        name: abs(dataset[f"limit_{name}"] / dataset.limit_exact - 1)
        for name in ("implicit", "through", "dense")
    }
    far = {name: float(gap[name].max(skipna=False)) for name in ("implicit", "through")}
    return [
        Claim(
            id="hypergradient/singular-limit",
            statement="At convergence implicit differentiation gives dw/dλ = −Xᵀ(XXᵀ + λI)⁻²t with "
            "more parameters than examples, at λ = 0 too.",
            source="beyond the source",
            measured={
                "implicit: largest relative error": far["implicit"],
                "implicit: the same at λ = 0": float(gap["implicit"][:, 0].max()),
                "segmented, through the run: largest relative error": far["through"],
                "a dense solve with XᵀX + λI: the same at the least λ > 0": float(
                    gap["dense"][:, 1].max()
                ),
                "largest gradient at the end, in units of that at the start": float(
                    dataset.limit_residual.max()
                ),
            },
            tolerance="1e-7 relative (float64), at λ = 0 and from 1e-8 to 1",
            n_runs=dataset.limit_exact.size,
            interval=None,
            verdict=verdict(all(v < 1e-7 for v in far.values())),
            evidence="singular_limit/limit",
            plain_words="Implicit differentiation holds where the Hessian is singular",
            measured_short=f"relative error ≤ {number(far['implicit'])}; at λ = 0 "
            f"≤ {number(float(gap['implicit'][:, 0].max()))}",
        )
    ]
