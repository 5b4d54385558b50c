"""Which separating direction does each optimiser turn to, and how fast?"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import xarray as xr
from matplotlib.figure import Figure
from scipy.stats import t as student

from optjax.experiments.which_solution.contenders import scheduled
from optjax.report.claims import Claim, verdict
from optjax.report.rendering import number
from optjax.report.style import COLOURS, band, caption, figure
from optjax.run.batching import Batch
from optjax.run.geometries import steepest_descent
from optjax.run.optimizers import Factory
from optjax.run.problems import Data, Metrics, Problem
from optjax.run.trajectory import make_run
from optjax.support.console import silent
from optjax.support.errors import UserError
from optjax.support.types import HParams, Key, PyTree
from optjax.sweeps import grid, sweep
from optjax.theory.implicit_bias import NORMS, norm_name
from optjax.theory.least_norms import Inseparable, max_margin_direction

RECORDS = 1000


def falling(factory: Factory) -> Factory:
    """Let a learning rate fall as 1/√t, as steps of fixed length need."""
    return scheduled(factory, lambda done, steps: 1 / jnp.sqrt(1 + done))


def _unit(p: float) -> Factory:
    return falling(functools.partial(steepest_descent, p=p, normalize=True))


CLASSIFIERS: dict[str, tuple[Factory, float]] = {
    "gradient descent": (optax.sgd, 1.0),
    "momentum": (functools.partial(optax.sgd, momentum=0.9), 1.0),
    "normalised gradient descent": (_unit(2.0), 0.5),
    "coordinate descent": (_unit(1.0), 0.5),
    "sign descent": (_unit(np.inf), 0.5),
    "adam, ε = 0": (falling(functools.partial(optax.adam, eps=0.0)), 0.1),
    "adam": (falling(optax.adam), 0.1),
}
"""Name -> factory and learning rate; of gradient descent's in units of 1/L."""
GEOMETRY = {"gradient descent": "ℓ2", "momentum": "ℓ2", "normalised gradient descent": "ℓ2",
            "coordinate descent": "ℓ1", "sign descent": "ℓ∞", "adam, ε = 0": "ℓ∞",
            "adam": "ℓ2"}  # fmt: skip
"""The margin that each is to make largest; Adam's ε outlasts the gradients (Wang et al. 2021)."""


@dataclass(frozen=True)
class Config:
    """On separable labels, to which max-margin direction do weights turn, and at what rate?

    Two Gaussian clouds, logistic loss, all examples at each step.

    Command: optjax run max_margin. Cost: 10 s on two cores.
    Expect: gradient descent to the ℓ2 direction, its angle falling as 1/log t, faster where steps
    are normalised; coordinate descent to the ℓ1 margin, sign descent and Adam without ε to the ℓ∞
    margin; Adam with its ε in the end to the ℓ2 margin.
    """

    seed: int = 0
    """Seed of the clouds."""
    sets: int = 8
    """Data sets."""
    rows: int = 40
    """n of each."""
    columns: int = 6
    """d of each."""
    steps: int = 100_000
    """Steps a run."""


def _clouds(seed: int, n: int, d: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw labels and points around ±μ, again until a direction separates them widely."""
    rng = np.random.default_rng(seed)
    y = np.where(np.arange(n) % 2, 1.0, -1.0)
    scale = np.geomspace(1.0, 0.3, d)
    for _ in range(1000):
        centre = rng.normal(size=d)
        centre *= 2.5 / np.linalg.norm(centre)
        X = (y[:, None] * centre + rng.normal(size=(n, d))) * scale
        try:
            if max_margin_direction(X, y)[1] > 0.2:
                return X, y
        except Inseparable:
            continue
    raise UserError(
        f"of 1,000 pairs of clouds of {n} points in {d} dimensions none is separable with a margin "
        "of 0.2: take fewer rows"
    )


def run(config: Config, progress: Callable[[str, float], None] = silent) -> xr.Dataset:
    """Angles to the ℓ2 direction and shares of the largest margins along every run."""
    if config.steps < 1000 or config.sets < 2:
        raise UserError(
            "steps and sets: expected at least 1,000 and 2, to fit a power and interval"
        )
    drawn = [_clouds(config.seed + i, config.rows, config.columns) for i in range(config.sets)]
    X, y = (np.stack(parts) for parts in zip(*drawn, strict=True))
    found = [[max_margin_direction(a, b, p) for p in NORMS] for a, b in drawn]
    curvature = np.linalg.norm(X, 2, axis=(1, 2)) ** 2 / (4 * config.rows)
    every = max(1, config.steps // RECORDS)
    with jax.enable_x64(True):
        shared = {
            "A": y[:, :, None] * X,
            "direction": np.stack([row[0][0] for row in found]),
            "margin": np.array([[margin for _, margin in row] for row in found]),
        }
        problem = replace(logistic(shared), metrics=_margins)
        each = []
        for i, (name, (factory, rate)) in enumerate(CLASSIFIERS.items()):
            rates = rate / curvature if factory in SMOOTH else np.full(config.sets, rate)
            run = make_run(problem, factory, config.steps, record_every=every)
            points = [{"set": k, "learning_rate": r} for k, r in enumerate(rates)]
            runs = sweep(
                run,
                grid.points(points),
                progress=lambda text, f, i=i, name=name: progress(
                    f"{name}: {text}", (i + f) / len(CLASSIFIERS)
                ),
            )
            names = ["angle", *(f"share {norm_name(p)}" for p in NORMS)]
            each.append(runs[names].isel(seed=0).reset_coords(drop=True).rename(point="set"))
    kept = np.unique(np.geomspace(1, len(each[0].step), 100).round().astype(int)) - 1
    return xr.concat([e.isel(step=kept) for e in each], "optimizer").assign_coords(
        optimizer=list(CLASSIFIERS)
    )


SMOOTH = [CLASSIFIERS[name][0] for name in ("gradient descent", "momentum")]


def logistic(shared: dict[str, np.ndarray]) -> Problem:
    """The mean of log(1 + exp(−yxᵀw)) over a set's rows, from 0; shared["A"] is yX, (sets, n, d).

    Which set it is, is the hyperparameter "set".
    """
    data = Data((), jax.tree.map(jnp.asarray, shared))
    return Problem(_start, _loss, _objective, data, hparams=frozenset({"set"}))


def _start(key: Key, data: Data) -> tuple[PyTree, PyTree]:
    return jnp.zeros(data.shared["A"].shape[-1]), ()


def _value(w: jax.Array, shared: PyTree, hparams: HParams) -> jax.Array:
    A = shared["A"][hparams["set"].astype(jnp.int32)]
    return jnp.mean(jnp.logaddexp(0.0, -(A @ w)))


def _loss(w: jax.Array, state: PyTree, batch: Batch, hparams: HParams) -> tuple[jax.Array, PyTree]:
    return _value(w, batch.shared, hparams), state


def _objective(w: jax.Array, state: PyTree, data: Data, hparams: HParams) -> jax.Array:
    return _value(w, data.shared, hparams)


def _margins(w: jax.Array, state: PyTree, data: Data, hparams: HParams) -> Metrics:
    A, goal, margin = (
        data.shared[name][hparams["set"].astype(jnp.int32)] for name in ("A", "direction", "margin")
    )
    unit = w / jnp.linalg.norm(w)
    half = jnp.arctan2(jnp.linalg.norm(unit - goal), jnp.linalg.norm(unit + goal))
    least = jnp.min(A @ w)
    shares = {
        f"share {norm_name(p)}": least / jnp.linalg.norm(w, p) / margin[i]
        for i, p in enumerate(NORMS)
    }
    return {"angle": 2 * half, **shares}


def _exponent(dataset: xr.Dataset, name: str) -> np.ndarray:
    """The power of log t by which each run's angle changes over the last two decades."""
    late = dataset.sel(optimizer=name).where(dataset.step >= dataset.step[-1] / 100, drop=True)
    x = np.log(np.log(late.step.values))
    angle = np.log(late.angle.transpose("step", "set").values)
    return np.polyfit(x, angle, 1)[0]


def figures(dataset: xr.Dataset) -> dict[str, Figure]:
    """Angles to the ℓ2 direction; what is missing of each margin."""
    fig, (left, right) = figure("wide", 1, 2, height=3.9)
    t = dataset.step.values
    for i, name in enumerate(dataset.optimizer.values):
        angle = np.degrees(dataset.angle.sel(optimizer=name).transpose("set", "step").values)
        missing = 1 - dataset[f"share {GEOMETRY[name]}"].sel(optimizer=name)
        missing = missing.transpose("set", "step").values
        for ax, values in ((left, angle), (right, missing)):
            ax.loglog(
                t, np.median(values, axis=0), color=COLOURS[i], label=f"{name} ({GEOMETRY[name]})"
            )
            if name in ("gradient descent", "normalised gradient descent"):
                band(ax, t, values.min(axis=0), values.max(axis=0), alpha=0.15)
    guide = np.degrees(dataset.angle.sel(optimizer="gradient descent")).median("set").values
    left.loglog(t, guide[-1] * np.log(t[-1]) / np.log(t), color="#222222", ls="--", lw=1,
                label="∝ 1/log t")  # fmt: skip
    left.set(xlabel="step t", ylabel="angle to the ℓ2 direction, degrees")
    right.set(xlabel="step t", ylabel="1 − margin / largest margin")
    right.set_title("each by the margin in brackets")
    fig.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4,
               frameon=False, fontsize=8)  # fmt: skip
    caption(fig, "Gradient descent turns to the ℓ2 direction as slowly as 1/log t, normalised "
            "steps sooner; sign descent turns elsewhere. Lines: medians over data sets; "
            "bands: all, of two of them.")  # fmt: skip
    return {"directions": fig}


def claims(dataset: xr.Dataset) -> list[Claim]:
    """implicit-bias/max-margin."""
    exponent = _exponent(dataset, "gradient descent")
    mean, half = (
        float(exponent.mean()),
        float(student.ppf(0.975, exponent.size - 1) * exponent.std(ddof=1) / exponent.size**0.5),
    )
    last = dataset.isel(step=-1)
    angle = {name: np.degrees(last.angle.sel(optimizer=name).values) for name in GEOMETRY}
    best = {}
    for name in GEOMETRY:
        shares = {n: last[f"share {n}"].sel(optimizer=name).median() for n in map(norm_name, NORMS)}
        best[name] = max(shares, key=lambda norm: float(shares[norm]))
    faster = bool((angle["normalised gradient descent"] < 0.5 * angle["gradient descent"]).all())
    # Adam's ε takes over at some step; until then it is on its way to the ℓ∞ margin.
    decided = all(best[name] == norm for name, norm in GEOMETRY.items() if name != "adam")
    own = {
        f"{name}: least share of the {norm} margin": float(
            last[f"share {norm}"].sel(optimizer=name).min()
        )
        for name, norm in GEOMETRY.items()
    }
    return [
        Claim(
            id="implicit-bias/max-margin",
            statement="On separable labels gradient descent turns to the ℓ2 max-margin direction "
            "with an angle ∝ 1/log t, normalised steps faster; coordinate descent to the ℓ1 "
            "margin, sign descent and Adam without ε to the ℓ∞ margin.",
            source="beyond the source",
            measured={
                "gradient descent: power of log t in the angle": mean,
                **{f"{name}: median angle to the ℓ2 direction, degrees": float(np.median(a))
                   for name, a in angle.items()},
                **own,
                "largest share of a margin": best,
            },
            tolerance="power −1 ± 0.3; normalised at half the angle or less; each has the "
            "largest share of its own margin",
            n_runs=dataset.sizes["set"] * dataset.sizes["optimizer"],
            interval={"power of log t": [mean - half, mean + half]},
            verdict=verdict(abs(mean + 1) < 0.3 and faster and decided),
            evidence="max_margin/directions",
            plain_words="On separable labels each optimiser turns to a max-margin direction",
            source_short="beyond the source",
            measured_short=f"GD's angle ∝ (log t)^{number(mean, 2)} [{number(mean - half, 2)}, "
            f"{number(mean + half, 2)}]",
        )
    ]  # fmt: skip
