"""Does mini-batch SGD from zero find the minimum-norm solution, and from w0 the nearest one?"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import xarray as xr
from matplotlib.figure import Figure

from optjax.experiments.which_solution import paths
from optjax.report.claims import Claim, verdict
from optjax.report.rendering import number
from optjax.report.style import COLOURS, band, caption, figure
from optjax.run.problems import Data, Metrics, Problem, least_squares
from optjax.run.trajectory import Run, make_run
from optjax.support.console import silent
from optjax.support.types import HParams, PyTree
from optjax.sweeps import grid, sweep
from optjax.theory import solutions

TOLERANCE = 1e-8
STARTS = ("zero", "off the row space")
SAMPLERS = ("replacement", "epochs", "shuffle_once")
MOMENTA = (0.0, 0.9)
BATCHES = 4
"""Batch sizes, from 1 to n."""


@dataclass(frozen=True)
class Config:
    """Where does SGD end, from zero and from elsewhere, whatever the batch and its sampling?

    Command: optjax run minimum_norm. Cost: 25 s on two cores; --full 30 s.
    Expect: both errors near 1e-15 off the row space and far below 1e-8 at the end.
    """

    seed: int = 0
    """Seed of the problems and of the batches."""
    rows: tuple[int, ...] = (5, 8, 12)
    """n of each problem; at least 4."""
    columns: tuple[int, ...] = (12, 20, 40)
    """d of each problem, more than its n."""
    problems: int = 2
    """Random (X, t) of each size."""
    seeds: int = 7
    """Runs of each, with batches of their own, for every setting."""
    steps: int = 2000
    """SGD steps a run."""


FULL = {
    "problems": 4,
}
"""The sizes of RESULTS.md."""


def _problems(rng: np.random.Generator, count: int, n: int, d: int):
    """X with singular values 1 … 2 (well-conditioned, so that every run converges), t and w0."""
    X = np.empty((count, n, d))
    for i in range(count):
        U, _ = np.linalg.qr(rng.normal(size=(n, n)))
        V, _ = np.linalg.qr(rng.normal(size=(d, n)))
        X[i] = (U * np.linspace(1, 2, n)) @ V.T
    return X, rng.normal(size=(count, n)), rng.normal(size=(count, d))


def run(config: Config, progress: Callable[[str, float], None] = silent) -> xr.Dataset:
    """Distance to the solution and off-row-space share along every run."""
    with jax.enable_x64(True):
        return _run(config, progress)


def _run(config: Config, progress: Callable[[str, float], None]) -> xr.Dataset:
    rng = np.random.default_rng(config.seed)
    kept = np.unique(np.geomspace(1, config.steps, 60).round().astype(int))
    sizes = [np.linspace(1, n, BATCHES).round().astype(int) for n in config.rows]
    found = []
    for i, (n, d) in enumerate(zip(config.rows, config.columns, strict=True)):
        X, t, off = _problems(rng, config.problems, n, d)
        # η = 1/max‖x‖²: each step without momentum is then a contraction, for every batch.
        rates = 1 / np.max(np.sum(X**2, axis=2), axis=1)
        problems = {
            start: [
                _watched(least_squares(X[k], t[k], w0[k], scale=0.5))
                for k in range(config.problems)
            ]
            for start, w0 in zip(STARTS, (np.zeros_like(off), off), strict=True)
        }

        def make(start: str, sampler: str, problem: int, problems=problems) -> Run:
            return make_run(problems[start][problem], optax.sgd, config.steps, sampler=sampler)

        # Momentum multiplies a lasting step by 1/(1 − β).
        points = [
            {"start": start, "sampler": sampler, "batch_size": int(b), "problem": k,
             "momentum": beta, "learning_rate": rates[k] * (1 - beta)}
            for start in STARTS
            for sampler in SAMPLERS
            for b in sizes[i]
            for k in range(config.problems)
            for beta in MOMENTA
        ]  # fmt: skip
        runs = sweep(
            make,
            grid.points(points),
            config.seeds,
            progress=lambda text, f, i=i, n=n, d=d: progress(
                f"{n} × {d}: {text}", 0.9 * (i + f) / len(config.rows)
            ),
        )
        shape = (len(STARTS), len(SAMPLERS), BATCHES, config.problems * len(MOMENTA) * config.seeds)
        far, share = (
            runs[name].values.reshape(*shape, config.steps) for name in ("distance", "off_share")
        )
        dims = ("start", "sampler", "batch", "run")
        found.append(
            xr.Dataset(
                {
                    "distance": ((*dims, "step"), far[..., kept - 1]),
                    "off_share": ((*dims, "step"), share[..., kept - 1]),
                    "final_distance": (dims, far[..., -1]),
                    "largest_off_share": (dims, share.max(axis=-1)),
                    "batch_size": ("batch", sizes[i]),
                }
            )
        )
    return xr.concat(found, "problem").assign(
        plane_path=(("line", "plane_step", "axis"), _plane()),
    ).merge(paths.found(lambda text, f: progress(text, 0.9 + 0.1 * f))).assign_coords(
        problem=[f"{n} × {d}" for n, d in zip(config.rows, config.columns, strict=True)],
        sampler=list(SAMPLERS),
        start=list(STARTS),
        step=kept,
    )  # fmt: skip


def _watched(problem: Problem) -> Problem:
    """The problem with its distance to where SGD should end, and the share off the row space."""
    X, t = problem.data.examples["x"], problem.data.examples["t"]
    shared = problem.data.shared
    known = {
        "off": solutions.off_row_space(X, jnp.eye(X.shape[1])),
        "end": solutions.nearest_solution(X, t, shared["w0"]),
    }
    return replace(problem, data=Data(problem.data.examples, shared | known), metrics=_distances)


def _distances(w: jax.Array, state: PyTree, data: Data, hparams: HParams) -> Metrics:
    norm, shared = jnp.linalg.norm, data.shared
    # From w0 ≠ 0 it is the distance gone that lies in the row space.
    gone = w - shared["w0"]
    return {
        "distance": norm(w - shared["end"]) / norm(shared["end"]),
        "off_share": norm(shared["off"] @ gone) / norm(gone),
    }


def _plane() -> np.ndarray:
    """Paths to the line 2w₁ + w₂ = 2 from several starts."""
    X, t = np.array([[2.0, 1.0]]), np.array([2.0])
    starts = np.array([[0.0, 0.0], [-0.4, 1.2], [1.5, 1.6], [0.2, -1.1], [1.9, 0.3]])

    def path(w0: jax.Array) -> jax.Array:
        problem = least_squares(X, t, w0, scale=0.5)
        run = make_run(problem, optax.sgd, 60, sampler="full", record_path=True)
        return run({"learning_rate": 0.05}, jax.random.key(0)).path

    return np.asarray(jax.vmap(path)(jnp.asarray(starts)))


def figures(dataset: xr.Dataset) -> dict[str, Figure]:
    """Convergence by batch size; the off-row-space share; the plane."""
    fig, (left, right) = figure("wide", 1, 2)
    last = dataset.isel(problem=-1, start=0)
    x = dataset.step.values
    names = ("batch", "sampler", "run")
    for b in range(dataset.sizes["batch"]):
        runs = last.distance.isel(batch=b).transpose("step", ...).values.reshape(len(x), -1)
        size = int(last.batch_size[b])
        left.loglog(x, np.maximum(np.median(runs, axis=1), 1e-17), label=f"batch {size}")
        band(left, x, np.maximum(runs.min(axis=1), 1e-17), runs.max(axis=1))
    left.axhline(TOLERANCE, color="#777777", ls="--", lw=1)
    left.text(1, TOLERANCE * 1.8, "tolerance 1e-8", fontsize=8, color="#555555")
    left.set(xlabel="SGD step", ylabel="‖u − w*‖ / ‖w*‖")
    left.set_title(f"distance to w*, n × d = {dataset.problem.values[-1]}", fontsize=10)
    left.legend(frameon=False, fontsize=8)
    for colour, problem in zip(COLOURS, dataset.problem.values, strict=False):
        runs = dataset.off_share.sel(problem=problem, start="zero")
        right.loglog(x, runs.median(names), color=colour, label=problem)
        band(right, x, runs.min(names), runs.max(names), colour=colour)
    right.axhline(TOLERANCE, color="#777777", ls="--", lw=1)
    right.set(xlabel="SGD step", ylabel="‖(I − P)u‖ / ‖u‖", ylim=(1e-17, 1e-7))
    right.set_title("share of the iterate off the row space", fontsize=10)
    right.legend(frameon=False, fontsize=8, title="n × d", title_fontsize=8)
    caption(fig, "From zero SGD stays in the row space to rounding and ends at w*, for every batch "
            "size. Lines: medians over runs; bands: all runs.")  # fmt: skip

    plane, ax = figure("single", height=3.4)
    w1 = np.array([-0.2, 1.7])
    ax.plot(w1, 2 - 2 * w1, color="#000000", lw=1.5, label="solutions, 2w₁ + w₂ = 2")
    for i, path in enumerate(dataset.plane_path.values):
        ax.plot(*path.T, "-", marker=".", ms=4, color=COLOURS[0 if i == 0 else 1], lw=1,
                label=("from 0", "from other starts", None, None, None)[min(i, 4)])  # fmt: skip
        ax.plot(*path[0], "o", mfc="white", color=COLOURS[0 if i == 0 else 1])
    ax.plot(0.8, 0.4, "*", ms=15, color=COLOURS[2], label="w* = (0.8, 0.4)", zorder=5)
    ax.set(xlabel="w₁", ylabel="w₂", xlim=(-0.9, 2.9), ylim=(-1.3, 2.9), aspect="equal")
    ax.legend(frameon=False, fontsize=8, loc="upper right")
    caption(plane, "Each path moves along (2, 1) only, so it ends at the solution nearest to its "
            "start; from zero that is w*.")  # fmt: skip
    return {"paths": paths.drawn(dataset), "convergence": fig, "plane": plane}


def claims(dataset: xr.Dataset) -> list[Claim]:
    """min-norm/sgd and min-norm/start-off-row-space."""
    texts = {
        "zero": (
            "min-norm/sgd",
            "From u = 0 every SGD iterate stays in the row space of X, and the solution that it "
            "converges to is w*.",
            "SGD from zero converges to the minimum-norm solution w*",
            "all iterates are in the row space; the limit is w*",
            "limit w*; iterates in the row space",
        ),
        "off the row space": (
            "min-norm/start-off-row-space",
            "From w0 ≠ 0 SGD converges to the solution nearest to w0, w* + (I − P)w0.",
            "SGD from elsewhere converges to the nearest solution",
            "beyond the source",
            "beyond the source",
        ),
    }
    found = []
    for start, (name, statement, words, source, short) in texts.items():
        here = dataset.sel(start=start)
        share = float(here.largest_off_share.max(skipna=False))
        far = float(here.final_distance.max(skipna=False))
        runs = here.final_distance.size
        found.append(
            Claim(
                id=name,
                statement=statement,
                source=source,
                measured={
                    "largest ‖(I − P)(u_t − w0)‖/‖u_t − w0‖ over every step": share,
                    "largest final relative distance": far,
                    "n × d": dataset.problem.values.tolist(),
                    "batch sizes": [row.tolist() for row in dataset.batch_size.values],
                    "sampling": dataset.sampler.values.tolist(),
                    "momentum β": list(MOMENTA),
                },
                tolerance=f"{TOLERANCE:g} (float64)",
                n_runs=runs,
                interval=None,
                verdict=verdict(share < TOLERANCE and far < TOLERANCE),
                evidence="minimum_norm/convergence" if start == "zero" else "minimum_norm/plane",
                plain_words=words,
                source_short=short,
                measured_short=f"distance ≤ {number(far)}, off the row space ≤ {number(share)}",
            )
        )
    return found
