"""How many steps does a larger batch save, where does it stop, and what helps beyond?"""

import dataclasses
import functools
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

from optjax.batching import Batch
from optjax.colourisation import models
from optjax.colourisation.palette import grey, kmeans_palette, nearest_colour
from optjax.colourisation.pictures import load_pictures
from optjax.colourisation.problem import colourisation_problem
from optjax.console import silent
from optjax.errors import UserError
from optjax.noise.batch_sizes import critical_batch_size
from optjax.noise.critical_batch import fit_critical_batch
from optjax.noise.quadratic import noisy_quadratic
from optjax.noise.reach import fewest_steps
from optjax.noise.regimes import Regime, local_slope, regime
from optjax.noise.steps_to_target import StepsToTarget, steps_table, steps_to_target
from optjax.problems import Problem, least_squares
from optjax.report.claims import Claim, verdict
from optjax.report.style import COLOURS, MARKERS, caption, figure
from optjax.sweeps import sweep
from optjax.sweeps.rules import Target
from optjax.trajectory import make_run

PROBLEMS = {
    "quadratic": "noisy quadratic, exact",
    "squares": "least squares",
    "net": "ConvTransposeNet",
}
OPTIMISERS = ("SGD", "momentum", "Adam", "preconditioned")
PRECONDITIONED = {"quadratic": "h^−½ SGD", "squares": "Newton", "net": "Muon"}
BANDS = {Regime.NOISE: "#DCE9F5", Regime.TRANSITION: "#F3F3F3", Regime.CURVATURE: "#FBE6D8"}


@dataclass(frozen=True)
class Config:
    """How do the steps to a target depend on the batch, for optimisers of first and second order?

    Command: optjax run batch_size_and_steps. Cost: 10 min on two cores.
    Expect: each doubling halves the steps while noise dominates; then it buys almost nothing, and
    a preconditioned optimiser does. The knee is at the critical batch size.
    """

    data: str | None = None
    """Pictures for the network: FILE.npz, FOLDER/ or cifar10; without it, embedded photographs."""
    seed: int = 0
    """Seed of the data; runs have the seeds 0, 1, …"""
    spectrum: int = 10_000
    """d of the quadratic: curvatures 1, 1/2, …, 1/d, the gradient's variance the same."""
    exponents: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10)
    """k of the quadratic's batch sizes 4ᵏ; with momentum, every third."""
    risk: float = 0.01
    """Target of the quadratic, of a first risk of 4.9."""
    rows: int = 512
    """n of least squares."""
    columns: int = 24
    """d of least squares."""
    batches: tuple[int, ...] = (2, 4, 8, 16, 32, 64, 128, 256, 512)
    """Batch sizes of least squares."""
    rates: int = 12
    """Learning rates of least squares for every optimiser."""
    seeds: int = 8
    """Runs of least squares for every optimiser, rate and batch."""
    steps: int = 2000
    """Most steps of least squares."""
    excess: float = 0.05
    """Target of least squares: loss above the least, in units of the noise's variance."""
    net_batches: tuple[int, ...] = (16, 32, 64, 128, 256)
    """Batch sizes of the network; below 16 the statistics of its batches are another story."""
    net_rates: int = 4
    """Learning rates of the network for every optimiser."""
    net_seeds: int = 5
    """Runs of the network for every optimiser, rate and batch."""
    net_examples: int = 4000
    """Most examples of a run of the network, and at least `net_steps` steps."""
    net_steps: int = 64
    """Most steps of the network at a large batch."""
    net_loss: float = 1.9
    """Target of the network: training loss, nats a pixel."""
    pictures: int = 256
    """Crops of 16 × 16 pixels that the network trains on."""
    filters: int = 8
    """NF of the network."""


@dataclass(frozen=True, eq=False)
class Newton:
    """w ← w − η H⁻¹g, for a Hessian that is known."""

    inverse: jax.Array  # (d, d) H⁻¹

    def __call__(self, learning_rate: Any) -> optax.GradientTransformation:
        def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
            return -learning_rate * (self.inverse @ grads), state

        return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


@dataclass(frozen=True)
class WholeLoss:
    """The training loss of all examples as one batch: a metric without the luck of a draw."""

    loss: Any

    def __call__(self, params: Any, state: Any, data: Any, hparams: Any) -> dict[str, jax.Array]:
        batch = Batch(data.examples, None, jax.random.key(0), data.shared)
        return {"whole_loss": self.loss(params, state, batch, hparams)[0]}


def run(config: Config, progress: Callable[[str, float], None] = silent) -> xr.Dataset:
    """Steps to the target for every problem, optimiser and batch size."""
    if len(config.exponents) < 3:
        raise UserError(f"exponents are {config.exponents}: expected at least three batch sizes")
    parts = [
        *_quadratic(config, lambda text, f: progress(f"quadratic: {text}", 0.3 * f)),
        *_squares(config, lambda text, f: progress(f"least squares: {text}", 0.3 + 0.2 * f)),
        *_net(config, lambda text, f: progress(f"network: {text}", 0.5 + 0.5 * f)),
    ]
    return xr.merge(parts, join="outer", combine_attrs="drop_conflicts")


def _named(problem: str, optimiser: str, found: xr.Dataset) -> xr.Dataset:
    """The same variables and axes under names of the problem and the optimiser."""
    prefix = f"{problem}_{optimiser}_".replace(" ", "_")
    axes = {name: f"{prefix}{name}" for name in ("learning_rate", "seed") if name in found.dims}
    axes["batch_size"] = f"{problem}_batch_size"
    named = found.rename(axes | {str(name): f"{prefix}{name}" for name in found.data_vars})
    named.attrs = {f"{prefix}notes": found.attrs.get("notes", "")}
    return named


# ------------------------------------------------------------------------------------ problems


def _quadratic(config: Config, progress: Callable[[str, float], None]) -> list[xr.Dataset]:
    ways: dict[str, dict[str, float]] = {
        "SGD": {}, "preconditioned": {"power": 0.5}, "momentum": {"momentum": 0.9}
    }  # fmt: skip
    h = 1 / np.arange(1, config.spectrum + 1.0)
    found = []
    with jax.enable_x64(True):
        for i, (name, way) in enumerate(ways.items()):
            best = jax.jit(
                lambda size, way=way: fewest_steps(
                    noisy_quadratic(h, batch_size=size, **way), config.risk
                )
            )
            exponents = config.exponents[:: 3 if name == "momentum" else 1]
            rows = []
            for j, k in enumerate(exponents):
                progress(f"{name}, B = {4**k}", (i + j / len(exponents)) / 3)
                rows.append([float(x) for x in best(float(4**k))])
            table = np.array(rows)
            part = xr.Dataset(
                {"steps": ("batch_size", table[:, 1]), "rate": ("batch_size", table[:, 0])},
                {"batch_size": [4**k for k in exponents]},
            )
            if name == "SGD":
                sizes = part.batch_size.values.astype(float)
                fit = fit_critical_batch(sizes, table[:, 1])
                slope = local_slope(sizes, table[:, 1])
                for key, value in fit._asdict().items():
                    part[key] = float(value)
                part["slope"] = "batch_size", slope
                part["regime"] = "batch_size", regime(slope)
            found.append(_named("quadratic", name, part))
    return found


def _squares(config: Config, progress: Callable[[str, float], None]) -> list[xr.Dataset]:
    rng = np.random.default_rng(config.seed)
    n, d = config.rows, config.columns
    if max(config.batches) > n:
        raise UserError(f"batches holds {max(config.batches)}: expected 1 to rows = {n}")
    # Columns of different scale: the curvatures spread over a factor of 100.
    X = rng.normal(size=(n, d)) * np.geomspace(1, 0.1, d)
    t = X @ (3 * rng.normal(size=d)) + rng.normal(size=n)
    least = float(np.mean((t - X @ np.linalg.lstsq(X, t, rcond=None)[0]) ** 2))
    cap = float(n / np.linalg.norm(X, 2) ** 2)  # 2/λ_max, for λ_max = 2σ²_max/n
    inverse = np.linalg.inv(2 * X.T @ X / n).astype(np.float32)
    ways = {
        "SGD": (optax.sgd, np.geomspace(cap / 300, 1.2 * cap, config.rates)),
        "momentum": (
            functools.partial(optax.sgd, momentum=0.9),
            np.geomspace(cap / 3000, 1.2 * cap, config.rates),
        ),
        "Adam": (optax.adam, np.geomspace(0.003, 1, config.rates)),
        "preconditioned": (Newton(jnp.asarray(inverse)), np.geomspace(0.003, 1.5, config.rates)),
    }
    problem = least_squares(X.astype(np.float32), t.astype(np.float32))
    found = []
    for i, (name, (optimiser, rates)) in enumerate(ways.items()):
        table = _table(
            problem, optimiser, rates, dict.fromkeys(config.batches, config.steps),
            config.seeds, 1000, least + config.excess,
            lambda text, f, i=i, name=name: progress(f"{name}: {text}", (i + f) / len(ways)),
        )  # fmt: skip
        found.append(_named("squares", name, critical_batch_size(table)))
    return found


def _net(config: Config, progress: Callable[[str, float], None]) -> list[xr.Dataset]:
    data = load_pictures(config.data, seed=config.seed)
    rng = np.random.default_rng(config.seed)
    count = min(config.pictures, len(data.train))
    if max(config.net_batches) > count:
        raise UserError(f"net_batches holds {max(config.net_batches)}: expected 1 to {count}")
    tiles = data.train[np.sort(rng.choice(len(data.train), count, replace=False))]
    corners = rng.integers(0, np.array(tiles.shape[1:3]) - 15, (count, 2))
    crops = np.stack([p[i : i + 16, j : j + 16] for p, (i, j) in zip(tiles, corners, strict=True)])
    labels = nearest_colour(crops, kmeans_palette(crops, 24, config.seed))
    problem = colourisation_problem(
        models.model("conv-transpose", filters=config.filters), (grey(crops), labels)
    )
    muon = functools.partial(optax.contrib.muon, muon_weight_dimension_numbers=_matrices)
    span = functools.partial(np.geomspace, num=config.net_rates)
    ways = {
        "SGD": (optax.sgd, span(0.1, 1.2)),
        "momentum": (functools.partial(optax.sgd, momentum=0.9), span(0.02, 0.5)),
        "Adam": (optax.adam, span(0.005, 0.08)),
        "preconditioned": (muon, span(0.03, 0.4)),
    }
    steps = {b: max(config.net_steps, config.net_examples // b) for b in config.net_batches}
    found = []
    for i, (name, (optimiser, rates)) in enumerate(ways.items()):
        table = _table(
            problem, optimiser, rates, steps, config.net_seeds, 18, config.net_loss,
            lambda text, f, i=i, name=name: progress(f"{name}: {text}", (i + f) / len(ways)),
        )  # fmt: skip
        found.append(_named("net", name, critical_batch_size(table, statistic="mean")))
    return found


def _matrices(params: Any) -> Any:
    """For Muon, a kernel (k, k, in, out) is a matrix (k·k·in, out)."""
    whole = optax.contrib.MuonDimensionNumbers((0, 1, 2), (3,))
    return jax.tree.map(lambda w: whole if w.ndim == 4 else None, params)


def _table(
    problem: Problem,
    optimiser: Any,
    rates: np.ndarray,
    steps: dict[int, int],
    seeds: int,
    records: int,
    target: float,
    progress: Callable[[str, float], None],
) -> StepsToTarget:
    """Steps to the target, batch sizes of as many steps (`steps`) in one sweep."""
    problem = dataclasses.replace(problem, metrics=WholeLoss(problem.loss))
    budgets: dict[int, list[int]] = {}
    for size, most in steps.items():
        budgets.setdefault(most, []).append(size)
    parts = []
    for i, (most, sizes) in enumerate(budgets.items()):
        every = max(1, most // records)
        found = sweep(
            make_run(
                problem, optimiser, every * (most // every), max_batch_size=max(sizes),
                record_every=every,
            ),
            {"learning_rate": rates, "batch_size": sizes},
            seeds,
            stop=Target(target, "whole_loss"),
            progress=lambda text, f, i=i: progress(text, (i + f) / len(budgets)),
        )  # fmt: skip
        parts.append(steps_to_target(found, target, "whole_loss"))
    joined = (np.concatenate([part[k] for part in parts]) for k in (0, 2, 3))
    sizes_B, steps_BRS, censored_BRS = joined
    return steps_table(sizes_B, parts[0].rates, steps_BRS, censored_BRS)


# ------------------------------------------------------------------------------------- reading


def _of(dataset: xr.Dataset, problem: str, optimiser: str, name: str) -> np.ndarray | None:
    """A variable of a problem and optimiser; None where it was not measured."""
    key = f"{problem}_{optimiser}_{name}"
    return dataset[key].values if key in dataset else None


def _series(
    dataset: xr.Dataset, problem: str, optimiser: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Batch sizes that reach the target, the steps, and their 95 % intervals (2, B)."""
    steps = _of(dataset, problem, optimiser, "steps")
    if steps is None:
        return np.empty(0), np.empty(0), np.empty((2, 0))
    sizes = dataset[f"{problem}_batch_size"].values
    good = np.isfinite(steps)
    ends = _of(dataset, problem, optimiser, "steps_interval")
    ends = np.stack([steps, steps]) if ends is None else ends.T
    return sizes[good], steps[good], ends[:, good]


def _faster(
    dataset: xr.Dataset, problem: str, optimiser: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """How many times fewer steps than SGD's, where both reach the target, with 95 % intervals."""
    sizes, sgd, ends = _series(dataset, problem, "SGD")
    others, steps, other_ends = _series(dataset, problem, optimiser)
    both = np.intersect1d(sizes, others)
    i, j = np.searchsorted(sizes, both), np.searchsorted(others, both)
    log = np.log(sgd[i] / steps[j])
    # Different runs: the halves of the intervals add up as independent errors do.
    down = np.hypot(np.log(sgd[i] / ends[0, i]), np.log(other_ends[1, j] / steps[j]))
    up = np.hypot(np.log(ends[1, i] / sgd[i]), np.log(steps[j] / other_ends[0, j]))
    return both, np.exp(log), np.exp(np.stack([log - down, log + up]))


def _doubling(dataset: xr.Dataset, problem: str, which: int) -> tuple[float, list[float] | None]:
    """How many times fewer steps a doubled batch takes SGD, at the smallest or largest batch."""
    sizes, _, _ = _series(dataset, problem, "SGD")
    all_sizes = dataset[f"{problem}_batch_size"].values
    at = int(np.flatnonzero(all_sizes == sizes[which])[0])
    slope = _of(dataset, problem, "SGD", "slope")
    ends = _of(dataset, problem, "SGD", "slope_interval")
    assert slope is not None
    interval = None if ends is None else sorted((2.0 ** -ends[at]).tolist())
    return float(2.0 ** -slope[at]), interval


def _regimes(dataset: xr.Dataset, problem: str) -> tuple[np.ndarray, np.ndarray]:
    """Batch sizes, and SGD's regime at each."""
    named = _of(dataset, problem, "SGD", "regime")
    sizes = dataset[f"{problem}_batch_size"].values
    assert named is not None
    known = np.isfinite(named) & (named >= 0)
    return sizes[known], named[known].astype(int)


# ------------------------------------------------------------------------------------- figures


def _axis(ax: Axes, sizes: np.ndarray) -> None:
    ax.set(xscale="log", yscale="log", xlabel="batch size B (examples)")
    shown = sizes if len(sizes) <= 6 else sizes[:: -(-len(sizes) // 5)]
    ax.set_xticks(shown, [f"{b:,.0f}" if b < 10**5 else f"$2^{{{np.log2(b):.0f}}}$" for b in shown])
    ax.set_xticks([], minor=True)


def _bands(ax: Axes, dataset: xr.Dataset, problem: str) -> None:
    """SGD's regimes behind the curves, each batch size halfway to its neighbours."""
    sizes, named = _regimes(dataset, problem)
    x = np.log(sizes)
    edges = np.exp(np.concatenate([[x[0] - 0.3], (x[1:] + x[:-1]) / 2, [x[-1] + 0.3]]))
    for i, kind in enumerate(named):
        ax.axvspan(edges[i], edges[i + 1], color=BANDS[Regime(kind)], lw=0, zorder=0)
    for kind, word in ((Regime.NOISE, "noise"), (Regime.CURVATURE, "curvature")):
        at = np.flatnonzero(named == kind)
        if at.size:
            middle = np.sqrt(edges[at[0]] * edges[at[-1] + 1])
            ax.text(middle, 0.015, word, transform=ax.get_xaxis_transform(), ha="center",
                    va="bottom", fontsize=8, color="#555555")  # fmt: skip


def _steps(ax: Axes, dataset: xr.Dataset, problem: str) -> None:
    _bands(ax, dataset, problem)
    drawn = []
    for i, optimiser in enumerate(OPTIMISERS):
        sizes, steps, ends = _series(dataset, problem, optimiser)
        if not sizes.size:
            continue
        label = PRECONDITIONED[problem] if optimiser == "preconditioned" else optimiser
        bars = np.abs(np.clip(ends, steps / 50, steps * 50) - steps)
        ax.errorbar(sizes, steps, yerr=bars, fmt=MARKERS[i], ls="-" if i else "none", lw=1,
                    color=COLOURS[i], capsize=2, ms=4, label=label, zorder=3)  # fmt: skip
        drawn += [*steps]
    S_min, B_crit = (float(dataset[f"{problem}_SGD_{name}"]) for name in ("S_min", "B_crit"))
    sizes, steps, _ = _series(dataset, problem, "SGD")
    x = np.geomspace(sizes[0] / 1.3, sizes[-1] * 1.3, 200)
    ax.plot(x, S_min * (1 + B_crit / x), color=COLOURS[0], lw=1.6, label="SGD, the law's fit")
    ax.plot(x, steps[0] * sizes[0] / x, ":", color="#555555", lw=1.2, label="slope −1")
    ax.axvline(B_crit, color="#333333", lw=1, ls="--")
    ends = _of(dataset, problem, "SGD", "B_crit_interval")
    if ends is not None and np.isfinite(ends).all():
        ax.axvspan(*ends, color="#333333", alpha=0.15, lw=0)
    ax.text(B_crit * 1.1, 0.98, f"$B_{{crit}}$ = {B_crit:,.0f}", fontsize=8,
            transform=ax.get_xaxis_transform(), va="top")  # fmt: skip
    _axis(ax, dataset[f"{problem}_batch_size"].values)
    ax.set(ylabel="steps to the target", ylim=(min(drawn) / 2, max(drawn) * 2),
           xlim=(x[0], x[-1]))  # fmt: skip
    ax.set_title(PROBLEMS[problem], fontsize=10)
    ax.legend(frameon=False, fontsize=7, loc="lower left", bbox_to_anchor=(0, 0.06))


def _remedies(ax: Axes, dataset: xr.Dataset, problem: str) -> None:
    _bands(ax, dataset, problem)
    for i, optimiser in enumerate(OPTIMISERS[1:], 1):
        sizes, factor, ends = _faster(dataset, problem, optimiser)
        if not sizes.size:
            continue
        label = PRECONDITIONED[problem] if optimiser == "preconditioned" else optimiser
        ax.errorbar(sizes, factor, yerr=np.abs(ends - factor), fmt=f"{MARKERS[i]}-", lw=1.2,
                    color=COLOURS[i], capsize=2, ms=4, label=label, zorder=3)  # fmt: skip
    ax.axhline(1, color=COLOURS[0], lw=1.2, label="SGD")
    all_sizes = dataset[f"{problem}_batch_size"].values
    _axis(ax, all_sizes)
    ax.set(ylabel="times fewer steps than SGD", xlim=(all_sizes[0] / 1.3, all_sizes[-1] * 1.3))
    ax.set_title(PROBLEMS[problem], fontsize=10)
    ax.legend(frameon=False, fontsize=7, loc="upper left")


def _plane(ax: Axes, dataset: xr.Dataset) -> None:
    """Every problem's runs of SGD on the law's one curve."""
    for i, problem in enumerate(PROBLEMS):
        sizes, steps, _ = _series(dataset, problem, "SGD")
        S_min, E_min = (
            float(_of(dataset, problem, "SGD", n) or np.nan) for n in ("S_min", "E_min")
        )
        ax.plot(steps / S_min, sizes * steps / E_min, MARKERS[i], color=COLOURS[i], ms=5,
                label=PROBLEMS[problem])  # fmt: skip
    x = np.geomspace(1.003, 1e4, 400)
    ax.plot(x, 1 + 1 / (x - 1), color="#333333", lw=1, label="(S/S_min − 1)(E/E_min − 1) = 1")
    ax.set(xscale="log", yscale="log", xlabel="steps S / S_min", ylabel="examples E / E_min",
           xlim=(0.8, 1e4), ylim=(0.7, 3e3))  # fmt: skip
    ax.legend(frameon=False, fontsize=8)


def figures(dataset: xr.Dataset) -> dict[str, Figure]:
    """Steps against the batch; what other optimisers save; the law's curve."""
    steps, axes = figure("wide", 1, 3, height=3.9)
    for ax, problem in zip(axes, PROBLEMS, strict=True):
        _steps(ax, dataset, problem)
    caption(steps, "Steps to a target at each batch size's tuned rate, 95 % intervals over seeds. "
            " SGD follows S_min (1 + B_crit/B): slope −1 while noise dominates (blue), flat "
            "where curvature does (orange), the knee at the critical batch size.")  # fmt: skip
    remedies, axes = figure("wide", 1, 3, height=3.4)
    for ax, problem in zip(axes, PROBLEMS, strict=True):
        _remedies(ax, dataset, problem)
    caption(remedies, "What momentum and preconditioning save, beside SGD at the same batch size: "
            "on quadratic and least squares the more, the more curvature dominates.")  # fmt: skip
    plane, ax = figure("single")
    _plane(ax, dataset)
    caption(plane, "Steps against examples, in units of the least, of SGD at every batch size: a "
            "faster run wastes examples, a thrifty one steps.")  # fmt: skip
    return {"steps": steps, "remedies": remedies, "trade-off": plane}


# -------------------------------------------------------------------------------------- claims


def claims(dataset: xr.Dataset) -> list[Claim]:
    """batch-size/critical, batch-size/noise-regime and batch-size/curvature-regime."""
    runs = sum(v.size for name, v in dataset.data_vars.items() if str(name).endswith("_censored"))
    return [_critical(dataset, runs), _noise(dataset, runs), _curvature(dataset, runs)]


def _critical(dataset: xr.Dataset, runs: int) -> Claim:
    measured, interval, knees, ends_right = {}, {}, [], []
    for problem, title in PROBLEMS.items():
        sizes, named = _regimes(dataset, problem)
        B_crit = float(dataset[f"{problem}_SGD_B_crit"])
        ends = _of(dataset, problem, "SGD", "B_crit_interval")
        measured[f"{title}: B_crit"] = B_crit
        interval[f"{title}: B_crit"] = None if ends is None else ends.tolist()
        for which, word in ((0, "smallest"), (-1, "largest")):
            name = f"{title}: factor saved by a doubling at the {word} batch"
            measured[name], interval[name] = _doubling(dataset, problem, which)
        measured[f"{title}: regimes"] = ", ".join(
            f"{b:,.0f}: {Regime(k).name.lower()}" for b, k in zip(sizes, named, strict=True)
        )
        knees.append(sizes[0] < B_crit < sizes[-1])
        ends_right.append(named[0] == Regime.NOISE and named[-1] == Regime.CURVATURE)
    return Claim(
        id="batch-size/critical",
        statement="Each doubling of the batch halves the steps to a target at first, then it buys "
        "almost nothing; the efficient batch is at the knee between.",
        source="steps against batch size: a noise-dominated part of slope −1, a knee, a flat part",
        measured=measured,
        tolerance="on every problem: SGD's slope d log S/d log B below −¾ at the smallest batch "
        "that reaches the target and above −¼ at the largest, and B_crit between them",
        n_runs=runs,
        interval=interval,
        verdict=verdict(all(knees) and all(ends_right), reasoning=all(knees)),
        evidence="batch_size_and_steps/steps",
    )


def _noise(dataset: xr.Dataset, runs: int) -> Claim:
    measured, interval, halves, against = {}, {}, [], []
    for problem, title in PROBLEMS.items():
        sizes, steps, ends = _series(dataset, problem, "SGD")
        known, named = _regimes(dataset, problem)
        noisy = np.isin(sizes, known[named == Regime.NOISE])
        last = max(1, int(noisy.sum()) - 1)
        doublings = np.log2(sizes[last] / sizes[0])
        name = f"{title}: times fewer steps a doubling, B = {sizes[0]:,.0f} to {sizes[last]:,.0f}"
        log = np.log(steps[0] / steps[last])
        down = np.hypot(np.log(steps[0] / ends[0, 0]), np.log(ends[1, last] / steps[last]))
        up = np.hypot(np.log(ends[1, 0] / steps[0]), np.log(steps[last] / ends[0, last]))
        factor, low, high = (float(np.exp(x / doublings)) for x in (log, log - down, log + up))
        measured[name] = factor
        interval[name] = None if problem == "quadratic" else [low, high]
        halves.append(noisy.any() and factor > 1.5 and low > 1)
        against.append(not noisy.any() or high < 1.5)
    return Claim(
        id="batch-size/noise-regime",
        statement="Where noise dominates, parallel compute (a larger batch) accelerates training.",
        source="in the noise-dominated regime doubling the batch halves the steps",
        measured=measured,
        tolerance="on every problem, over SGD's noise-dominated batch sizes, a doubling saves a "
        "factor of more than 1.5 (2 is perfect), its 95 % interval above 1; refuted where the "
        "interval of one is below 1.5; else undecided, as not run",
        n_runs=runs,
        interval=interval,
        verdict=_decided(halves, against),
        evidence="batch_size_and_steps/steps",
    )


def _decided(good: list[bool], against: list[bool]) -> str:
    """A verdict where the intervals allow one; too few seeds refute nothing."""
    return verdict(all(good)) if all(good) or any(against) else "not run"


def _curvature(dataset: xr.Dataset, runs: int) -> Claim:
    measured, interval, flat, helped, against = {}, {}, [], [], []
    for problem, title in PROBLEMS.items():
        size = _series(dataset, problem, "SGD")[0][-1]
        name = f"{title}: times fewer steps from doubling B = {size:,.0f}"
        factor, ends = _doubling(dataset, problem, -1)
        measured[name], interval[name] = factor, ends
        flat.append(factor < 1.2)
        against.append((ends or [factor])[0] > 1.2)
        best = PRECONDITIONED[problem]
        sizes, factors, spans = _faster(dataset, problem, "preconditioned")
        for which in (0, -1):
            name = f"{title}: times fewer steps by {best} at B = {sizes[which]:,.0f}"
            measured[name] = float(factors[which])
            interval[name] = None if problem == "quadratic" else spans[:, which].tolist()
        helped.append(spans[0, -1] > 1)
        against.append(spans[1, -1] < 1)
    return Claim(
        id="batch-size/curvature-regime",
        statement="Where curvature dominates, a larger batch does not accelerate training; a "
        "second-order or better preconditioned optimiser does.",
        source="in the curvature-dominated regime second-order methods help, parallel compute does "
        "not",
        measured=measured,
        tolerance="on every problem, at the largest batch: another doubling saves less than a "
        "factor 1.2, and the preconditioned optimiser saves one above 1 (95 % interval); refuted "
        "where an interval says the contrary; else undecided, as not run",
        n_runs=runs,
        interval=interval,
        verdict=_decided([*flat, *helped], against),
        evidence="batch_size_and_steps/remedies",
    )
