"""How much worse than the best schedule is the learning rate that is best for every next step?"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from optjax.report.claims import Claim, verdict
from optjax.report.rendering import number
from optjax.report.style import COLOURS, MARKERS, caption, figure
from optjax.support.console import silent
from optjax.support.errors import UserError
from optjax.support.machine import quick_jit
from optjax.theory.moments import final_risk, risks
from optjax.theory.noisy_quadratic import noisy_quadratic
from optjax.theory.quadratic_rates import best_constant_rate, best_schedule, greedy_schedule

PUBLISHED = {"constant": 0.0258, "greedy": 0.443}
"""Final risks at a spectrum of 10⁴, 10⁴ steps and B = 256, to three digits."""

LOOK = {
    "greedy": ("greedy: best for each next step", COLOURS[1], "-"),
    "constant": ("best constant rate", COLOURS[6], "--"),
    "best": ("best schedule for the last step", COLOURS[0], "-"),
}


@dataclass(frozen=True)
class Config:
    """Is the greedy learning rate short-sighted on the noisy quadratic model, and how badly?

    Command: optjax run short_horizon_bias. Cost: 20 s on two cores; --full 30 s.
    Expect: greedy rates decay at once; after 3,000 steps greedy ends at 20 to 90 times the risk of
    the best schedule, and at 5 to 15 times that of the best constant rate.
    """

    spectrum: int = 1000
    """d: the curvatures are 1, 1/2, …, 1/d, the gradient's variance the same, s0 = 1."""
    batches: tuple[int, ...] = (16, 256, 4096)
    """Batch sizes B."""
    horizons: tuple[int, ...] = (10, 30, 100, 300, 1000)
    """Numbers of steps T."""


FULL = {
    "horizons": (10, 30, 100, 300, 1000, 3000),
}
"""The sizes of RESULTS.md."""


def run(config: Config, progress: Callable[[str, float], None] = silent) -> xr.Dataset:
    """The three schedules and their exact risks for every batch size and horizon."""
    if not config.batches or not config.horizons:
        raise UserError("batches or horizons are empty: expected at least one of each")
    with jax.enable_x64(True):
        return _run(config, progress)


def _run(config: Config, progress: Callable[[str, float], None]) -> xr.Dataset:
    model = noisy_quadratic(1 / np.arange(1, config.spectrum + 1))
    batches, horizons = list(config.batches), sorted(config.horizons)
    names, longest = list(LOOK), horizons[-1]
    final = np.empty((len(names), len(batches), len(horizons)))
    slopes = np.empty(final.shape[1:])
    rates, paths = (np.empty((len(names), len(batches), longest + i)) for i in (0, 1))
    for j, horizon in enumerate(horizons):
        schedules = quick_jit(functools.partial(_schedules, model.h, horizon))
        for i, size in enumerate(batches):
            progress(f"{horizon} steps", (horizon * len(batches) + longest * i / 2) / (longest * 9))
            found, slopes[i, j] = schedules(float(size))
            for n, name in enumerate(names):
                final[n, i, j] = found[name][1][-1]
                if horizon == longest:
                    rates[n, i], paths[n, i] = found[name]
    progress("published values", 0.9)
    full = noisy_quadratic(1 / np.arange(1, 10_001), batch_size=256)
    rate = best_constant_rate(full, 10_000)
    published = {
        "constant": float(final_risk(full, rate, 10_000)),
        "greedy": float(greedy_schedule(full, 10_000).risks[-1]),
    }
    return xr.Dataset(
        {
            "final_risk": (("schedule", "batch_size", "horizon"), final),
            "slope": (("batch_size", "horizon"), slopes),
            "rate": (("schedule", "batch_size", "step"), rates),
            "risk": (("schedule", "batch_size", "updates"), paths),
            "published_again": ("published", [published[name] for name in PUBLISHED]),
        },
        {
            "schedule": names,
            "batch_size": batches,
            "horizon": horizons,
            "step": np.arange(1, longest + 1),
            "updates": np.arange(longest + 1),
            "published": list(PUBLISHED),
        },
        {"published_rate": float(rate)},
    )


def _schedules(
    h: jax.Array, steps: int, batch_size: jax.Array
) -> tuple[dict[str, tuple[jax.Array, jax.Array]], jax.Array]:
    """Rates (T,) and risks (T + 1,) of each schedule, and the slope at the best one."""
    model = noisy_quadratic(h, batch_size=batch_size)
    best, greedy = best_schedule(model, steps), greedy_schedule(model, steps)
    constant = jnp.full(steps, best_constant_rate(model, steps))
    found = {
        "greedy": (greedy.rates, greedy.risks),
        "constant": (constant, risks(model, constant)),
        "best": (best.rates, best.risks),
    }
    return found, best.gradient


def _along(ax: Axes, x: np.ndarray, values: xr.DataArray, ylabel: str) -> None:
    for name, (label, colour, dashes) in LOOK.items():
        ax.plot(x, values.sel(schedule=name), dashes, color=colour, label=label, lw=1.8)
    ax.set(xscale="log", yscale="log", xlabel="step t", ylabel=ylabel)


def figures(dataset: xr.Dataset) -> dict[str, Figure]:
    """Rates and risks along the longest horizon; the factors against the horizon."""
    sizes = dataset.batch_size.values
    size = sizes[len(sizes) // 2]
    one, longest = dataset.sel(batch_size=size), int(dataset.horizon.values[-1])
    along, axes = figure("wide", 1, 2, height=3.6)
    _along(axes[0], one.step.values, one.rate, "learning rate α (1/largest curvature)")
    _along(axes[1], one.updates.values[1:], one.risk[:, 1:], "risk after step t (loss units)")
    axes[0].legend(frameon=False, fontsize=8, loc="lower left")
    caption(along, "Greedy wins the first steps and decays its rate at once; the best schedule "
            "keeps the largest stable rate, lets the noise of the sharpest direction grow "
            f"meanwhile, and settles it at the end. Left: the learning rates, B = {size}, "
            f"{longest:,} steps; right: the exact risk along them.")  # fmt: skip

    factors, axes = figure("wide", 1, 2, height=3.4, sharey=True)
    for ax, other, title in zip(
        axes, ("best", "constant"), ("the best schedule", "the best constant rate"), strict=True
    ):
        for i, size in enumerate(sizes):
            risk = dataset.final_risk.sel(batch_size=size)
            factor = risk.sel(schedule="greedy") / risk.sel(schedule=other)
            ax.plot(dataset.horizon, factor, color=COLOURS[i], marker=MARKERS[i], ms=4.5,
                    label=f"B = {size}")  # fmt: skip
        ax.axhline(1, color="#777777", lw=1, ls=":")
        ax.set(xscale="log", yscale="log", xlabel="horizon T (steps)")
        ax.set_title(f"greedy against {title}", fontsize=10)
    axes[0].set_ylabel("final risk, greedy / other")
    axes[0].legend(frameon=False, fontsize=8, loc="upper left")
    caption(factors, "Greedy always ends worse than the best schedule, by ever more as the horizon "
            "grows, and worse than one constant rate once the horizon is long enough. Above the "
            "dotted line its final risk is the higher one.")  # fmt: skip
    return {"schedules": along, "factor": factors}


def claims(dataset: xr.Dataset) -> list[Claim]:
    """short-horizon/greedy-is-worse."""
    risk = dataset.final_risk
    greedy, best = risk.sel(schedule="greedy"), risk.sel(schedule="best")
    factor = (greedy / best).transpose("batch_size", "horizon").values
    horizons = ", ".join(str(T) for T in dataset.horizon.values)
    measured: dict[str, object] = {
        f"B = {size}: final risk, greedy / best schedule, at T = {horizons}": row.tolist()
        for size, row in zip(dataset.batch_size.values, factor, strict=True)
    }
    again = dict(zip(PUBLISHED, dataset.published_again.values.tolist(), strict=True))
    measured |= {f"10⁴ curvatures, 10⁴ steps, B = 256: {name}": r for name, r in again.items()}
    slope = float(dataset.slope.max())
    measured["largest |∂ log risk/∂ log α| of a free rate at the best schedule"] = slope
    beaten = greedy[:, -1] > risk.sel(schedule="constant")[:, -1]
    matches = all(float(f"{again[name]:.3g}") == value for name, value in PUBLISHED.items())
    grows = bool((np.diff(factor, axis=1) > 0).all() and (factor > 1).all())
    return [
        Claim(
            id="short-horizon/greedy-is-worse",
            statement="On the noisy quadratic model the learning rate that is best for every next "
            "step ends worse than the best schedule, by a factor that grows with the horizon, and "
            "in the end worse than one constant rate.",
            source="beyond the source; Wu et al. 2018, section 2",
            measured=measured,
            tolerance="the factor above 1 and growing from horizon to horizon for every batch "
            "size; greedy above the best constant rate at the longest; the best schedule "
            "stationary to 1e-8; the published risks "
            f"({PUBLISHED['constant']} constant, {PUBLISHED['greedy']} greedy) to three digits",
            n_runs=risk.size,
            interval=None,
            verdict=verdict(grows and bool(beaten.all()) and matches and slope < 1e-8),
            evidence="short_horizon_bias/factor",
            plain_words="Greedy learning rates end worse than the best schedule",
            measured_short=f"{number(factor[:, -1].min(), 2)} to {number(factor[:, -1].max(), 2)} "
            f"times its risk after {int(risk.horizon[-1]):,} steps",
            source_short="beyond the source",
        )
    ]
