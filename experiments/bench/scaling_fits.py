"""Bootstrap refits of Hoffmann's law beside a loop over SciPy's minimiser."""

import math
import os
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from optjax.scaling import HOFFMANN_2022, Runs, drop_highest, fit, hoffmann_loss, read_runs, runs
from optjax.scaling.bootstrap import bootstrap, counts
from optjax.scaling.fit import Fit
from optjax.scaling.minimise import _tile

from .measure import Entry, Side

FILE = "chinchilla_points.csv"


class ScalingSizes(NamedTuple):
    """`resamples` refits; SciPy does `part` of them, scaled: each refit is alike."""

    resamples: int = 4000
    part: int = 40


QUICK = ScalingSizes(resamples=64, part=4)


def entries(sizes: ScalingSizes) -> list[Entry]:
    """Ours compiled and with compiling, and SciPy's two quasi-Newton methods in a loop."""
    what = f"{sizes.resamples} bootstrap refits of E + A/N^α + B/D^β to 240 runs, float64"
    return [Entry("scaling", what, "s", "ours", lambda entry: _prepare(entry, sizes))]


def points() -> tuple[Runs, str]:
    """Hoffmann et al.'s runs where OPTJAX_DATA has them, else as many that the law made up."""
    file = Path(os.environ.get("OPTJAX_DATA", "")) / FILE
    if os.environ.get("OPTJAX_DATA") and file.is_file():
        return drop_highest(read_runs(file)[0], 5), f"the runs of {FILE} less five outliers"
    rng = np.random.default_rng(0)
    C = np.repeat(np.geomspace(6e18, 3e21, 10), 24)
    N = np.tile(np.geomspace(0.2, 5, 24), 10) * 0.1 * np.sqrt(C)
    with jax.enable_x64(True):
        loss = np.asarray(hoffmann_loss(HOFFMANN_2022, N, C / 6 / N))
    # Heavy tails, as the measured residuals have.
    noisy = loss * np.exp(0.004 * rng.standard_t(3, len(N)))
    return runs(noisy, N, C=C), "240 made-up runs: OPTJAX_DATA has no " + FILE


def _prepare(entry: Entry, sizes: ScalingSizes) -> list[Side]:
    made, note = points()
    entry.notes.append(f"scaling: {note}")
    found = fit(made)
    _worse(entry, found, sizes)

    def ours() -> float:
        start = time.perf_counter()
        bootstrap(found, sizes.resamples)
        return time.perf_counter() - start

    def compiling() -> float:
        _tile.clear_cache()
        return ours()

    ours()  # compiles what draws the resamples, too
    sides = [Side("ours", ours), Side("ours, compiling too", compiling, 2)]
    for method in METHODS:
        sides.append(Side(f"SciPy {method}, {sizes.part} scaled", _scipy(found, sizes, method)))
    return sides


METHODS: dict[str, dict[str, float]] = {
    "BFGS": {"gtol": 1e-6},
    "L-BFGS-B": {"ftol": 1e-13, "gtol": 1e-6},
}


def _scipy(found: Fit, sizes: ScalingSizes, method: str) -> Any:
    def measure() -> float:
        w = counts(jax.random.key(0), 0, sizes.part, len(found.runs.loss))
        start = time.perf_counter()
        for row in w:
            scipy_refit(found, row.astype(float), method)
        return (time.perf_counter() - start) * sizes.resamples / sizes.part

    return measure


def scipy_refit(found: Fit, w: np.ndarray, method: str) -> float:
    """The least objective that SciPy finds from the same start, by NumPy's own gradient.

    The logarithms are centred and the objective is scaled by 1e3, both of which help SciPy.
    """
    from scipy.optimize import minimize

    n, d = (np.log(x) - m for x, m in zip((found.runs.N, found.runs.D), found.means, strict=True))
    y, delta, scale = np.log(found.runs.loss), found.delta, 1e3

    def objective(theta: np.ndarray) -> tuple[float, np.ndarray]:
        a, b, e, alpha, beta = theta
        by_n, by_d, floor = np.exp(a - alpha * n), np.exp(b - beta * d), math.exp(min(e, 700))
        total = by_n + by_d + floor
        r = np.log(total) - y
        size = np.abs(r)
        value = w @ np.where(size <= delta, 0.5 * r * r, delta * (size - 0.5 * delta))
        c = w * np.clip(r, -delta, delta) / total
        cn, cd = c * by_n, c * by_d
        slope = [cn.sum(), cd.sum(), floor * c.sum(), -(cn @ n), -(cd @ d)]
        return scale * value, scale * np.array(slope)

    with np.errstate(all="ignore"):
        end = minimize(objective, found.theta, jac=True, method=method, options=METHODS[method])
    return float(end.fun) / scale


def _worse(entry: Entry, found: Fit, sizes: ScalingSizes) -> None:
    """Say in how many of the refits that SciPy does ours ends higher."""
    ours = bootstrap(found, max(sizes.part, 2)).objective[: sizes.part]
    w = counts(jax.random.key(0), 0, sizes.part, len(found.runs.loss)).astype(float)
    for method in METHODS:
        theirs = np.array([scipy_refit(found, row, method) for row in w])
        if len(ours) == len(theirs):
            count = int(np.sum(ours > theirs * (1 + 1e-9)))
            gap = float(np.max(theirs / ours) - 1)
            entry.notes.append(
                f"scaling: of {sizes.part} refits ours ends above SciPy {method} in {count}; "
                f"SciPy's end at most {gap:.1g} above ours"
            )
