"""Do runs of mini-batch SGD have the moments that theory gives, with and without replacement?"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import numpy as np
import optax
import xarray as xr
from matplotlib.figure import Figure
from scipy.stats import norm

from optjax.experiments.which_solution.contenders import final_weights
from optjax.experiments.which_solution.data_sets import gaussian
from optjax.report.claims import Claim, verdict
from optjax.report.rendering import number
from optjax.report.style import COLOURS, MARKERS, caption, figure
from optjax.run.problems import least_squares
from optjax.run.trajectory import Run, make_run
from optjax.support.console import silent
from optjax.sweeps import sweep
from optjax.theory.minibatch_moments import minibatch_moments

SAMPLERS = ("replacement", "epochs")
LIMIT = 4.5
"""Standard errors: of 1,000 independent normal numbers one is beyond with probability 0.007."""


@dataclass(frozen=True)
class Config:
    """Do the mean and the second moments of 10,000 runs agree with the exact ones?

    Least squares of singular values 2, 1, 2/3, …: slow and fast directions at once.

    Command: optjax run sgd_moments. Cost: 8 s on two cores.
    Expect: every moment within its standard error; without replacement SGD ends nearer to w*.
    """

    seed: int = 0
    """Seed of the problem."""
    rows: int = 6
    """n."""
    columns: int = 10
    """d."""
    batch_size: int = 2
    """b."""
    steps: tuple[int, ...] = (1, 2, 3, 6, 12, 24, 48, 96)
    """Steps T after which runs are compared."""
    seeds: int = 10000
    """Runs of each sampler and length."""


def run(config: Config, progress: Callable[[str, float], None] = silent) -> xr.Dataset:
    """Exact moments, and those of the runs with their standard errors."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(config.seed)
        n, d = config.rows, config.columns
        spectrum = 2 / np.arange(1.0, n + 1)
        data = gaussian("", n, rng.normal(size=d), spectrum, config.seed, tested=0)
        eta = 0.5 / np.max(np.sum(data.X**2, axis=1))
        problem = least_squares(data.X, data.t, scale=0.5)

        def make(sampler: str) -> Run:
            return make_run(
                problem, optax.sgd, max(config.steps), sampler=sampler,
                max_batch_size=config.batch_size,
            )  # fmt: skip

        runs = sweep(
            make,
            {"sampler": list(SAMPLERS), "steps": list(config.steps), "learning_rate": eta},
            config.seeds,
            final=final_weights,
            progress=progress,
        )
        found = []
        for sampler in SAMPLERS:
            for T in config.steps:
                exact = minibatch_moments(
                    data.X, data.t, np.zeros(d), eta, T, config.batch_size, sampler, scale=0.5 / n
                )
                w = runs.weights.sel(sampler=sampler, steps=T).values
                found.append(_compared(w - np.asarray(exact.end), exact))
        dataset = xr.concat(found, "case").assign_coords(
            case=[f"{s}, {T}" for s in SAMPLERS for T in config.steps]
        )
        shape = (len(SAMPLERS), len(config.steps))
        return xr.Dataset(
            {k: (("sampler", "T", *v.dims[1:]), v.values.reshape(shape + v.shape[1:]))
             for k, v in dataset.data_vars.items()},
            {"sampler": list(SAMPLERS), "T": list(config.steps)},
            {"seeds": config.seeds},
        )  # fmt: skip


def _compared(off: np.ndarray, exact) -> xr.Dataset:
    """Deviations of means and second moments from the exact ones, in standard errors."""
    m, d = off.shape
    i, j = np.triu_indices(d)
    values = np.hstack([off, off[:, i] * off[:, j]])
    expected = np.r_[exact.mean - exact.end, np.asarray(exact.second)[i, j]]
    error = values.std(axis=0, ddof=1) / np.sqrt(m)
    # A moment that every run shares, as after a whole epoch, has only rounding for an error.
    error = np.maximum(error, 1e-13 * np.sqrt(np.trace(exact.second)))
    squares = np.sum(off**2, axis=1)
    return xr.Dataset(
        {
            "z": ("moment", (values.mean(axis=0) - expected) / error),
            "distance": float(squares.mean()),
            "error": float(squares.std(ddof=1) / np.sqrt(m)),
            "exact": float(np.trace(exact.second)),
        }
    )


def figures(dataset: xr.Dataset) -> dict[str, Figure]:
    """Expected squared distance to w* by steps; all deviations in standard errors."""
    fig, (left, right) = figure("wide", 1, 2)
    T = dataset["T"].values
    for i, sampler in enumerate(dataset.sampler.values):
        here = dataset.sel(sampler=sampler)
        words = {"replacement": "with replacement", "epochs": "without, an epoch at a time"}
        left.semilogy(T, here.exact, color=COLOURS[i], label=f"{words[str(sampler)]}: exact")
        left.errorbar(T, here.distance, 1.96 * here.error, fmt=MARKERS[i], color=COLOURS[i],
                      mec="#222222", ms=6, label=f"the same, {dataset.seeds:,} runs")  # fmt: skip
        z = np.sort(here.z.values.ravel())
        share = (np.arange(z.size) + 0.5) / z.size
        right.plot(z, share, color=COLOURS[i], label=words[str(sampler)])
    left.set(xlabel="SGD step", ylabel="mean of ‖w − w*‖²")
    left.legend(frameon=False, fontsize=8)
    x = np.linspace(-3.5, 3.5, 200)
    right.plot(x, norm.cdf(x), color="#000000", ls="--", lw=1, label="standard normal")
    right.set(xlabel="deviation of a moment, standard errors", ylabel="share of moments below")
    right.legend(frameon=False, fontsize=8)
    caption(fig, "Runs have the exact moments, in every entry of the mean and of the second "
            "moments. Bars: 95 % intervals.")  # fmt: skip
    return {"moments": fig}


def claims(dataset: xr.Dataset) -> list[Claim]:
    """min-norm/minibatch-moments."""
    worst = {
        str(s): float(abs(dataset.z.sel(sampler=s)).max(skipna=False))
        for s in dataset.sampler.values
    }
    last = dataset.isel(T=-1)
    ratio = float(last.exact.sel(sampler="epochs") / last.exact.sel(sampler="replacement"))
    far = float(np.max(list(worst.values())))
    return [
        Claim(
            id="min-norm/minibatch-moments",
            statement="The mean and the second moments of mini-batch SGD follow an exact linear "
            "recursion, with replacement and without.",
            source="beyond the source",
            measured={
                **{f"largest deviation, {s}, standard errors": z for s, z in worst.items()},
                "moments compared": int(dataset.z.size),
                "E‖w − w*‖² without replacement, in that with": ratio,
            },
            tolerance=f"{LIMIT} standard errors",
            n_runs=int(dataset.seeds) * dataset.sizes["T"] * dataset.sizes["sampler"],
            interval=None,
            verdict=verdict(far < LIMIT),
            evidence="sgd_moments/moments",
            plain_words="Mini-batch SGD's moments in closed form, for both samplers",
            source_short="beyond the source",
            measured_short=f"{dataset.z.size:,} moments within {number(far, 2)} standard errors",
        )
    ]
