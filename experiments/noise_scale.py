"""Does the gradient noise scale, cheap along one run, predict the critical batch of many runs?"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import stats

from optjax.batching import Batch
from optjax.colourisation import models
from optjax.colourisation.palette import grey, kmeans_palette, nearest_colour
from optjax.colourisation.pictures import load_pictures
from optjax.colourisation.problem import colourisation_problem
from optjax.console import silent
from optjax.errors import UserError
from optjax.noise.batch_sizes import critical_batch_size
from optjax.noise.critical_batch import fit_critical_batch
from optjax.noise.curvature_scale import full_curvature_noise_scale
from optjax.noise.measured import per_example_noise_scale, two_batch_noise_scale
from optjax.noise.quadratic import noisy_quadratic, risk, step
from optjax.noise.reach import fewest_steps
from optjax.noise.recorded import with_noise_scale
from optjax.noise.scale import noise_scale, two_batch
from optjax.problems import Data, LossFn, Metrics, Problem, least_squares
from optjax.report.claims import Claim, mean_interval, verdict
from optjax.report.style import COLOURS, MARKERS, band, caption, figure
from optjax.sweeps import sweep
from optjax.sweeps.rules import Target
from optjax.trajectory import make_run
from optjax.types import Array, HParams, PyTree

FACTOR = 3.0
"""Prediction and measurement agree within this factor; fixed before anything was measured."""
COVERAGE = (0.93, 0.97)
"""The share of 95 % intervals that hold the truth."""
FAMILIES = {
    "quadratic": "noisy quadratic (exact)",
    "squares": "least squares",
    "net": "ConvTransposeNet",
}
SCALES = ("simple", "curved", "averaged")
BOUND = ["low", "high"]
TRUTH = {"square": 1.0, "trace": 49.5}
"""|G|² and tr Σ of the Gaussian gradients with which ratios are compared."""


@dataclass(frozen=True)
class Config:
    """Is the critical batch size of steps to a target what B_simple along one run says?

    Command: optjax run noise_scale. Cost: 2 to 3 minutes on two cores.
    Expect: the right order and no more: within a factor of 3 on the network, 2 to 14 times too
    large on noisy quadratics, 20 to 40 times on least squares with curvatures 44 times apart.
    """

    data: str | None = None
    """Pictures for the network: FILE.npz, FOLDER/ or cifar10; without it, embedded photographs."""
    seed: int = 0
    """Seed of the data; runs have the seeds 0, 1, …"""
    spectrum: int = 200
    """d of the noisy quadratic, h = 1/i."""
    rows: int = 1024
    """n of least squares."""
    columns: int = 8
    """d of least squares."""
    noises: tuple[float, ...] = (0.0, 0.5, 1.0, 2.0, 4.0)
    """Standard deviation of the targets' noise over that of the signal, one problem each."""
    squares_batches: tuple[int, ...] = (1, 4, 16, 64, 256, 1024)
    """Batch sizes of least squares."""
    squares_rates: int = 12
    """Learning rates of least squares, from 1/1000 of 2/λ_max to it."""
    squares_seeds: int = 6
    """Runs of least squares for every rate and batch."""
    squares_steps: int = 1500
    """Most steps of such a run."""
    squares_target: float = 0.05
    """Loss above the least, over that at the start."""
    pictures: int = 128
    """Tiles of 16 × 16 that the network trains on."""
    filters: int = 8
    """NF of the network."""
    colours: int = 8
    """NC of the network."""
    net_batches: tuple[int, ...] = (4, 8, 16, 64)
    """Batch sizes of the network."""
    net_rates: int = 5
    """Learning rates of the network."""
    net_seeds: int = 3
    """Runs of the network for every rate and batch."""
    net_steps: int = 160
    """Most steps of such a run."""
    net_every: int = 4
    """Steps from record to record."""
    net_targets: tuple[float, ...] = (1.6, 1.4)
    """Loss of all pictures in training mode (nats a pixel)."""
    net_blocks: int = 16
    """Batch size whose noise is measured on the network."""
    net_span: tuple[float, float] = (0.08, 1.0)
    """Lowest and highest learning rate of the network."""
    net_scale_seeds: int = 6
    """Runs of the network along which the scale is measured."""
    repeats: int = 1000
    """Experiments with estimators where the truth is known."""
    pairs: int = 256
    """Most pairs of such an experiment."""


class Point(NamedTuple):
    """One problem and target: what was measured of it, and what was predicted."""

    name: str
    family: str
    sizes: np.ndarray  # (B,)
    steps: np.ndarray  # (B,) at the tuned rate
    fit: np.ndarray  # (3,) B_crit, and its 95 % interval
    scales: dict[str, np.ndarray]  # (3,) value, low, high of each of SCALES that is known
    S_min: float


def run(config: Config, progress: Callable[[str, float], None] = silent) -> xr.Dataset:
    """Prediction and measurement on every problem; the estimator where the truth is known."""
    if not config.noises or not config.net_targets:
        raise UserError("noises or net_targets are empty: expected at least one of each")
    progress("noisy quadratic", 0.0)
    with jax.enable_x64(True):
        points = _quadratics(config)
    found = xr.Dataset()
    for i, noise in enumerate(config.noises):
        at = 0.1 + 0.4 * i / len(config.noises)
        point, seen = _squares(config, noise, lambda text, f, at=at: progress(text, at + 0.02 * f))
        points.append(point)
        if i == len(config.noises) // 2:
            found = seen
    more, net = _net(config, lambda text, f: progress(f"network: {text}", 0.5 + 0.4 * f))
    progress("estimators", 0.95)
    parts = [_table(points + more), found, net, _ratios(config), _coverage(config)]
    runs = (
        len(config.noises) * len(config.squares_batches) * config.squares_rates
        * config.squares_seeds
        + len(config.net_batches) * config.net_rates * config.net_seeds
    )  # fmt: skip
    attrs = {"repeats": config.repeats, "runs": runs}
    return xr.merge(parts, join="outer").assign_attrs(found.attrs | net.attrs | attrs)


def _table(points: list[Point]) -> xr.Dataset:
    """All points, those with fewer batch sizes filled up with NaN."""
    most = max(len(p.sizes) for p in points)
    sizes, steps = np.full((2, len(points), most), np.nan)
    for i, p in enumerate(points):
        sizes[i, : len(p.sizes)], steps[i, : len(p.sizes)] = p.sizes, p.steps
    unknown = np.full(3, np.nan)
    rows = {"critical": np.array([p.fit for p in points])}
    rows |= {s: np.array([p.scales.get(s, unknown) for p in points]) for s in SCALES}
    found: dict[str, Any] = {}
    for name, values in rows.items():
        found[name] = ("point", values[:, 0])
        found[f"{name}_interval"] = (("point", "bound"), values[:, 1:])
    found |= {"size": (("point", "nth"), sizes), "steps": (("point", "nth"), steps)}
    found["S_min"] = ("point", [p.S_min for p in points])
    coords = {"point": [p.name for p in points], "family": ("point", [p.family for p in points])}
    return xr.Dataset(found, coords | {"bound": BOUND})


# --------------------------------------------------------------------------- noisy quadratics


def _quadratics(config: Config) -> list[Point]:
    """Starts, noises and targets on h = 1/i; steps to the target and scales are all exact."""
    h = 1 / np.arange(1, config.spectrum + 1)
    ones, sizes = np.ones_like(h), np.geomspace(1, 1e6, 10)
    # The noise is ten times h, that B_crit may lie above 1: a factor of both, and of no ratio.
    cases = {
        "s0 = 1, target 0.3": (10 * h, ones, 0.3),
        "s0 = 1, target 0.1": (10 * h, ones, 0.1),
        "s0 = 1, target 0.03": (10 * h, ones, 0.03),
        "s0 = h, target 0.03": (10 * h, h, 0.03),
        "s0 = 1/h, target 0.1": (10 * h, 1 / h, 0.1),
        "white noise, target 0.1": (ones * 10 * h.mean(), ones, 0.1),
    }
    points = []
    for name, (c, s0, target) in cases.items():
        models_B = [noisy_quadratic(h, c, s0, batch_size=size) for size in sizes]
        goal = target * risk(models_B[0], models_B[0].s0)
        found = [fewest_steps(model, goal) for model in models_B]
        steps = np.array([float(f.crossing) for f in found])
        fit = fit_critical_batch(sizes, steps)
        scales = _exact_scales(models_B[-1], found[-1].rate, int(np.ceil(steps[-1])))
        critical = np.full(3, float(fit.B_crit))
        points.append(Point(name, "quadratic", sizes, steps, critical, scales, float(fit.S_min)))
    return points


def _exact_scales(model: Any, rate: Array, steps: int) -> dict[str, np.ndarray]:
    """E|G|² = Σh²s, tr Σ = Σc, E GᵀHG = Σh³s, tr HΣ = Σhc along the largest batch's best run."""
    h, c = model.h, model.c

    def once(s: Array, _: None) -> tuple[Array, tuple[Array, Array]]:
        s = step(model, s, rate)
        return s, (jnp.sum(h**2 * s), jnp.sum(h**3 * s))

    squares, curved = jax.lax.scan(once, model.s0, length=steps)[1]
    values = {
        "simple": jnp.mean(jnp.sum(c) / squares),
        "curved": jnp.mean(jnp.sum(h * c) / curved),
        "averaged": jnp.sum(c) / jnp.mean(squares),
    }
    return {name: np.full(3, float(value)) for name, value in values.items()}


# -------------------------------------------------------------------------------- least squares


@dataclass(frozen=True)
class _Excess:
    """(w − w*)ᵀA(w − w*) over its value at the start: exact, and cheaper than all the data."""

    def __call__(self, w: Array, state: PyTree, data: Data, hparams: HParams) -> Metrics:
        off = w - data.shared["best"]
        return {"excess": off @ data.shared["gram"] @ off / data.shared["start"]}


def _squares_problem(config: Config, noise: float) -> tuple[Problem, float]:
    """Least squares from w0 = 0, and 2/λ_max."""
    rng = np.random.default_rng(config.seed)
    n, d = config.rows, config.columns
    spread = np.geomspace(1, 0.15, d)
    X = rng.normal(size=(n, d)) * spread
    # Each column has its share of the loss, so that the slow ones have to be waited for.
    signal = X @ (rng.normal(size=d) / spread)
    t = signal + noise * signal.std() * rng.normal(size=n)
    best, gram = np.linalg.lstsq(X, t, rcond=None)[0], X.T @ X / n
    known = {"best": best, "gram": gram, "start": best @ gram @ best}
    problem = least_squares(X.astype(np.float32), t.astype(np.float32))
    shared = problem.data.shared | {k: jnp.asarray(v, jnp.float32) for k, v in known.items()}
    data = problem.data._replace(shared=shared)
    problem = dataclasses.replace(problem, data=data, metrics=_Excess())
    return problem, float(1 / np.linalg.eigvalsh(gram)[-1])


def _squares(
    config: Config, noise: float, progress: Callable[[str, float], None]
) -> tuple[Point, xr.Dataset]:
    problem, cap = _squares_problem(config, noise)
    target = config.squares_target
    swept = sweep(
        make_run(problem, optax.sgd, config.squares_steps),
        {
            "batch_size": list(config.squares_batches),
            "learning_rate": np.geomspace(cap / 1000, cap, config.squares_rates),
        },
        config.squares_seeds,
        stop=Target(target, "excess"),
        progress=progress,
    )
    found = critical_batch_size(swept, target, metric="excess", statistic="mean", may_fail=0)
    steps = max(3, int(np.ceil(float(found.steps[-1]))))
    once = make_run(with_noise_scale(problem), optax.sgd, steps, record_path=True)
    hparams = {"learning_rate": float(found.rate[-1]), "batch_size": config.squares_batches[-1]}
    runs = _runs(once, hparams, config.squares_seeds)
    path_STd = runs.path[:, 1:]  # from the first record on
    curved_ST = _at_each(_curvature, problem, path_STd)
    scales = _over_seeds(runs.metrics) | {"curved": _middle(curved_ST.value.mean(1))}
    first, pairs = _ratio(runs.metrics)[0], _at_each(_from_pairs, problem, path_STd[:1])
    name = f"noise {noise:g}"
    ends = np.stack([pairs.low[0], pairs.high[0]], -1)
    seen = xr.Dataset(
        {
            "squares_exact": ("squares_step", first),
            "squares_pairs": ("squares_step", pairs.value[0]),
            "squares_pairs_interval": (("squares_step", "bound"), ends),
            "squares_curved": ("squares_step", curved_ST.value[0]),
        },
        {"squares_step": np.arange(1, steps + 1), "bound": BOUND},
        {"squares_shown": name},
    )
    return _point(name, "squares", found, scales), seen


def _runs(once: Any, hparams: dict[str, Any], seeds: int) -> Any:
    """One run from each seed."""
    return jax.jit(jax.vmap(lambda key: once(hparams, key)))(_keys(seeds))


def _keys(count: int) -> Any:
    return jax.vmap(jax.random.key)(jnp.arange(count))


def _curvature(problem: Problem, w: Array, key: Any) -> Any:
    return full_curvature_noise_scale(problem, w, key, probes=32)


def _from_pairs(problem: Problem, w: Array, key: Any) -> Any:
    return two_batch_noise_scale(problem, w, key, batch_size=4, groups=8, pairs=64)


def _at_each(scale: Callable[..., Any], problem: Problem, path_STd: Array) -> Any:
    """A scale at every point of paths, with keys of their own, (S, T) each."""
    S, T = path_STd.shape[:2]
    keys = _keys(S * T).reshape(S, T)
    of = jax.vmap(jax.vmap(lambda w, key: scale(problem, w, key)))
    return jax.tree.map(lambda a: np.asarray(a, float), jax.jit(of)(path_STd, keys))


def _ratio(metrics: Metrics) -> np.ndarray:
    """B_simple at every record of every run, (S, T)."""
    traces, squares = (np.asarray(metrics[f"noise_scale_{part}"], float) for part in PARTS)
    return traces / squares


PARTS = ("trace", "gradient_square")


def _over_seeds(metrics: Metrics) -> dict[str, np.ndarray]:
    """B_simple's mean along each run, and the ratio of the parts' means; the seeds' middle."""
    means = [np.asarray(metrics[f"noise_scale_{p}"], float).mean(1) for p in PARTS]
    return {
        "simple": _middle(_ratio(metrics).mean(1)),
        "averaged": _middle(means[0] / means[1]),
    }


def _middle(values: np.ndarray) -> np.ndarray:
    """The geometric mean of the seeds' values, and its 95 % interval."""
    logs = np.log(values)
    return np.exp([logs.mean(), *(mean_interval(logs) or [logs[0], logs[0]])])


def _point(name: str, family: str, found: xr.Dataset, scales: dict[str, np.ndarray]) -> Point:
    fit = np.array([float(found.B_crit), *found.B_crit_interval.values])
    sizes, steps = found.batch_size.values, found.steps.values
    return Point(name, family, sizes, steps, fit, scales, float(found.S_min))


# -------------------------------------------------------------------------------------- network


@dataclass(frozen=True)
class _Whole:
    """The loss of all pictures as one batch: running averages of few steps would lag."""

    loss: LossFn

    def __call__(
        self, params: PyTree, model_state: PyTree, data: Data, hparams: HParams
    ) -> Metrics:
        batch = Batch(data.examples, None, jax.random.key(0), data.shared)
        return {"whole": self.loss(params, model_state, batch, hparams)[0]}


def _net(config: Config, progress: Callable[[str, float], None]) -> tuple[list[Point], xr.Dataset]:
    data = load_pictures(config.data, size=16, seed=config.seed)
    rng = np.random.default_rng(config.seed)
    count = min(config.pictures, len(data.train))
    tiles = data.train[np.sort(rng.choice(len(data.train), count, replace=False))]
    labels = nearest_colour(tiles, kmeans_palette(tiles, config.colours, config.seed))
    net = models.model("conv-transpose", filters=config.filters, colours=config.colours)
    problem = colourisation_problem(net, (grey(tiles), labels))
    problem = dataclasses.replace(problem, metrics=_Whole(problem.loss))
    every, hardest = config.net_every, min(config.net_targets)
    most = every * (config.net_steps // every)
    swept = sweep(
        make_run(problem, optax.sgd, most, record_every=every),
        {
            "batch_size": list(config.net_batches),
            "learning_rate": np.geomspace(*config.net_span, config.net_rates),
        },
        config.net_seeds,
        lanes="map",
        stop=Target(hardest, "whole"),
        progress=progress,
    )
    found = {
        target: critical_batch_size(swept, target, metric="whole", statistic="mean", may_fail=0)
        for target in config.net_targets
    }
    # One run, to the hardest target: the way to the others is its beginning.
    last = found[hardest]
    records = {t: max(2, int(np.ceil(float(f.steps[-1]) / every))) for t, f in found.items()}
    recorded = with_noise_scale(problem, config.net_blocks)
    once = make_run(recorded, optax.sgd, every * records[hardest], record_every=every)
    hparams = {"learning_rate": float(last.rate[-1]), "batch_size": config.net_batches[-1]}
    metrics = _runs(once, hparams, config.net_scale_seeds).metrics
    points = []
    for target, one in found.items():
        scales = _over_seeds({name: rows[:, : records[target]] for name, rows in metrics.items()})
        points.append(_point(f"target {target:g}", "net", one, scales))
    rows = np.array([_middle(column) for column in _ratio(metrics).T])
    seen = xr.Dataset(
        {
            "net_scale": ("net_step", rows[:, 0]),
            "net_scale_interval": (("net_step", "bound"), rows[:, 1:]),
        },
        {"net_step": every * np.arange(1, len(rows) + 1), "bound": BOUND},
        {"net_shown": f"target {hardest:g}"},
    )
    return points, seen


# ---------------------------------------------------------------------- where the truth is known


def _ratios(config: Config) -> xr.Dataset:
    """Ratio of means and mean of ratios of N pairs of batches of Gaussian gradients.

    With G along the first of d coordinates and Σ = (tr Σ/d)I, squared norms are sums of a squared
    normal number and of χ² ones, which are drawn.
    """
    d, b, m = 10, 16, 8
    counts = [n for n in (4, 8, 16, 32, 64, 128, 256) if n <= config.pairs]
    rng = np.random.default_rng(config.seed)
    shape = (config.repeats, counts[-1])
    variance = TRUTH["trace"] / d
    large = (np.sqrt(TRUTH["square"]) + np.sqrt(variance / (b * m)) * rng.normal(size=shape)) ** 2
    large += variance / (b * m) * rng.chisquare(d - 1, shape)
    small = large + variance / b * rng.chisquare(d * (m - 1), shape) / m
    rows: dict[str, list[np.ndarray]] = {"of_means": [], "of_ratios": []}
    held = []
    for count in counts:
        pairs = jax.vmap(lambda s, l: two_batch(s, l, b, b * m))(small[:, :count], large[:, :count])
        scales = jax.vmap(noise_scale)(pairs)
        rows["of_means"].append(np.asarray(scales.value, float))
        rows["of_ratios"].append(np.asarray(pairs.trace / pairs.gradient_square, float).mean(1))
        truth = TRUTH["trace"] / TRUTH["square"]
        held.append(float(np.mean((scales.low <= truth) & (truth <= scales.high))))
    levels = [0.025, 0.5, 0.975]
    found = {
        name: (("pairs", "level"), np.quantile(values, levels, axis=1).T)
        for name, values in rows.items()
    }
    return xr.Dataset(found | {"held": ("pairs", held)}, {"pairs": counts, "level": levels})


def _coverage(config: Config) -> xr.Dataset:
    """How many intervals of `two_batch_noise_scale` hold the truth of the least squares' data."""
    problem, _ = _squares_problem(config, config.noises[len(config.noises) // 2])
    w = jnp.zeros(config.columns, jnp.float32)
    truth = float(per_example_noise_scale(problem, w, exact=True).value)
    of = jax.jit(jax.vmap(lambda key: _from_pairs(problem, w, key)))
    found = of(_keys(config.repeats))
    held = np.mean((found.low <= truth) & (truth <= found.high))
    return xr.Dataset({"squares_held": float(held), "squares_truth": truth})


# ------------------------------------------------------------------------------------- figures

LABELS = {
    "simple": "B_simple = tr Σ/|G|², mean along the run",
    "curved": "B_noise = tr HΣ/GᵀHG, mean along the run",
}


def _both(ax: Axes, dataset: xr.Dataset, scale: str) -> None:
    """Measured against predicted, and the band of agreement."""
    shown = dataset.isel(point=_known(dataset[scale]) & _known(dataset.critical))
    x, y = shown[scale].values, shown.critical.values
    ends = np.array([0.6 * min(x.min(), y.min()), 1.7 * max(x.max(), y.max())])
    ax.plot(ends, ends, "-", color="#777777", lw=1, label="equal")
    band(ax, ends, ends / FACTOR, ends * FACTOR, colour="#777777", alpha=0.15,
         label=f"within a factor of {FACTOR:g}")  # fmt: skip
    for i, (family, title) in enumerate(FAMILIES.items()):
        own = shown.isel(point=shown.family.values == family)
        if not own.sizes["point"]:
            continue
        at, value = own[scale].values, own.critical.values
        off = [
            np.abs(_clipped(own[f"{name}_interval"].values, *ends).T - middle)
            for name, middle in ((scale, at), ("critical", value))
        ]
        ax.errorbar(
            at, value, xerr=off[0], yerr=off[1], fmt=MARKERS[i], color=COLOURS[i], ms=5, lw=1,
            capsize=2, label=title,
        )  # fmt: skip
    ax.set(xscale="log", yscale="log", xlim=ends, ylim=ends)
    ax.set(xlabel=f"{LABELS[scale]}\n(examples)", ylabel="critical batch measured (examples)")
    ax.legend(frameon=False, fontsize=7.5, loc="upper left")


def _clipped(ends: np.ndarray, low: float, high: float) -> np.ndarray:
    """Intervals that are unbounded end at the frame."""
    return np.clip(np.nan_to_num(ends, nan=low, posinf=high), low, high)


def _along(axes: np.ndarray, dataset: xr.Dataset) -> None:
    at, exact = dataset.squares_step.values, dataset.squares_exact.values
    frame = 0.3 * exact.min(), 5 * exact.max()
    low, high = _clipped(dataset.squares_pairs_interval.values, *frame).T
    value = _clipped(dataset.squares_pairs.values, *frame)
    bars = np.maximum([value - low, high - value], 0)
    ax = axes[0]
    ax.errorbar(at, value, yerr=bars, fmt="o", color=COLOURS[1], ms=4, lw=1, capsize=2,
                label="from 64 pairs of batches, 95 %")  # fmt: skip
    ax.plot(at, exact, "-", color=COLOURS[0], label="of all examples, exact")
    axes[1].plot(dataset.net_step, dataset.net_scale, "-o", color=COLOURS[0], ms=4,
                 label="middle of the runs, 95 %")  # fmt: skip
    band(axes[1], dataset.net_step, *dataset.net_scale_interval.values.T)
    for ax, family in zip(axes, ("squares", "net"), strict=True):
        name = dataset.attrs[f"{family}_shown"]
        critical = float(dataset.critical.sel(point=name))
        ax.axhline(critical, color="#777777", ls="--", label="critical batch measured")
        ax.set(yscale="log", xlabel="step", ylabel="B_simple (examples)")
        ax.set_title(f"{FAMILIES[family]}, {name}", fontsize=10)
        ax.legend(frameon=False, fontsize=8)
    axes[0].set_ylim(0.1 * min(frame[0], float(dataset.critical.sel(
        point=dataset.attrs["squares_shown"]))), frame[1])  # fmt: skip


def _estimators(axes: np.ndarray, dataset: xr.Dataset) -> None:
    ax, truth = axes[0], TRUTH["trace"] / TRUTH["square"]
    for i, (name, label) in enumerate(
        {"of_ratios": "mean of ratios", "of_means": "ratio of means"}.items()
    ):
        low, middle, high = dataset[name].transpose("level", "pairs").values
        ax.plot(dataset.pairs, middle, marker=MARKERS[i], color=COLOURS[1 - i], label=label)
        band(ax, dataset.pairs, low, high)
    ax.axhline(truth, color=COLOURS[6], ls="--", lw=1, label=f"truth, {truth:g}")
    ax.set(xscale="log", yscale="log", xlabel="pairs of batches", ylim=(truth / 3, 6 * truth),
           ylabel="estimate of B_simple (examples)")  # fmt: skip
    ax.legend(frameon=False, fontsize=8)
    ax = axes[1]
    ax.axhspan(100 * COVERAGE[0], 100 * COVERAGE[1], color="#777777", alpha=0.15, lw=0,
               label="93 to 97 %")  # fmt: skip
    held, n = dataset.held.values, int(dataset.attrs["repeats"])
    ax.errorbar(dataset.pairs, 100 * held, yerr=196 * np.sqrt(held * (1 - held) / n), fmt="o",
                color=COLOURS[0], ms=4, capsize=2, label="Gaussian gradients")  # fmt: skip
    ax.plot([64], [100 * float(dataset.squares_held)], "D", color=COLOURS[1],
            label="least squares")  # fmt: skip
    ax.set(xscale="log", xlabel="pairs of batches", ylim=(88, 100),
           ylabel="95 % intervals that hold the truth (%)")  # fmt: skip
    ax.legend(frameon=False, fontsize=8)
    for ax in axes:
        ax.set_xticks(dataset.pairs.values, [str(n) for n in dataset.pairs.values])
        ax.set_xticks([], minor=True)


def figures(dataset: xr.Dataset) -> dict[str, Figure]:
    """Measured against predicted; the scale along a run; the estimator where truth is known."""
    critical, axes = figure("wide", 1, 2, height=4.2)
    for ax, scale in zip(axes, LABELS, strict=True):
        _both(ax, dataset, scale)
    caption(critical, "The critical batch fitted to tuned steps to a target, against the noise "
            "scale along the largest batch's run alone; bars: 95 % intervals (the quadratics are "
            "exact). The curvature scale is not measured on the network.")  # fmt: skip
    along, axes = figure("wide", 1, 2, height=3.6)
    _along(axes, dataset)
    caption(along, "The noise scale grows along a run as the gradient falls and its noise "
            "stays. Bars that leave the frame: |G|² is not distinguishable from 0.")  # fmt: skip
    estimators, axes = figure("wide", 1, 2, height=3.6)
    _estimators(axes, dataset)
    caption(estimators, "Left: medians and the middle 95 % of "
            f"{dataset.attrs['repeats']} experiments with Gaussian gradients, |G|² = 1, "
            "tr Σ = 49.5, b = 16, B = 128. More pairs mend the ratio of means alone. Right: how "
            "many of its intervals hold the truth.")  # fmt: skip
    return {"critical": critical, "along": along, "estimators": estimators}


# -------------------------------------------------------------------------------------- claims


def _known(values: xr.DataArray) -> np.ndarray:
    """A critical batch of 0 or ∞ is none."""
    return np.isfinite(values.values) & (values.values > 0)


def _ranks(x: np.ndarray, y: np.ndarray) -> tuple[float, list[float]]:
    """Spearman's rank correlation of four or more, with the interval of Bonett and Wright (2000).

    tanh(artanh r ± 1.96 √((1 + r²/2)/(n − 3)))

    The low end of a perfect order is that of one with a neighbouring pair exchanged.
    """
    found: Any = stats.spearmanr(x, y)
    r, n = float(found.statistic), len(x)
    nearly = 1 - 12 / (n * (n**2 - 1))
    at = np.clip(r, -nearly, nearly)
    half = 1.96 * np.sqrt((1 + at**2 / 2) / (n - 3))
    low, high = np.tanh(np.arctanh(at) + np.array([-half, half]))
    return r, [float(min(low, r)), float(max(high, r))]


def _slope(x: np.ndarray, y: np.ndarray) -> tuple[float, list[float]]:
    """d log y/d log x by least squares, and Student's interval."""
    fit: Any = stats.linregress(np.log(x), np.log(y))
    half = stats.t.ppf(0.975, len(x) - 2) * fit.stderr
    return float(fit.slope), [float(fit.slope - half), float(fit.slope + half)]


def _predicts(dataset: xr.Dataset) -> Claim:
    measured: dict[str, Any] = {}
    interval: dict[str, Any] = {}
    for scale, label in (*LABELS.items(), ("averaged", "mean tr Σ/mean |G|² along the run")):
        for family in ("all", *FAMILIES):
            own = _known(dataset[scale]) & _known(dataset.critical)
            if family != "all":
                own &= dataset.family.values == family
            x, y = dataset[scale].values[own], dataset.critical.values[own]
            if len(x) < 2:
                continue
            title = f"{label}, {FAMILIES.get(family, 'all problems')}"
            measured[f"{title}: predicted/measured, least, geometric mean, most"] = [
                float(f) for f in ((x / y).min(), stats.gmean(x / y), (x / y).max())
            ]
            if len(x) < 4:
                continue
            for what, of in (("rank correlation", _ranks), ("log-log slope", _slope)):
                measured[f"{title}: {what}"], interval[f"{title}: {what}"] = of(x, y)
    for name in ("critical", "simple"):
        measured[f"{name}, by problem"] = dict(
            zip(dataset.point.values.tolist(), dataset[name].values.tolist(), strict=True)
        )
        ends = dataset[f"{name}_interval"].values.tolist()
        interval[f"{name}, by problem"] = dict(
            zip(dataset.point.values.tolist(), ends, strict=True)
        )
    known = _known(dataset.simple) & _known(dataset.critical)
    factor = dataset.simple.values[known] / dataset.critical.values[known]
    close = known.all() and bool(np.all(np.abs(np.log(factor)) <= np.log(FACTOR)))
    order = interval.get(f"{LABELS['simple']}, all problems: rank correlation")
    ranked = order is not None and order[0] > 0
    return Claim(
        id="noise-scale/predicts-critical-batch",
        statement="The gradient noise scale along one run, averaged over its steps, is the "
        "critical batch size of steps to a target.",
        source="beyond the source; McCandlish et al. 2018, section 2.2",
        measured=measured,
        tolerance=f"every problem's B_simple within a factor of {FACTOR:g} of its B_crit, and the "
        "95 % interval of the rank correlation over all problems above 0; corrected where the "
        "latter alone",
        n_runs=int(dataset.attrs["runs"]),
        interval=interval,
        verdict=verdict(close and ranked, reasoning=ranked),
        evidence="noise_scale/critical",
    )


def claims(dataset: xr.Dataset) -> list[Claim]:
    """noise-scale/predicts-critical-batch, /ratio-of-means and /interval-coverage."""
    truth, repeats = TRUTH["trace"] / TRUTH["square"], int(dataset.attrs["repeats"])
    most = dataset.isel(pairs=-1)
    means, ratios = (most[name].values for name in ("of_means", "of_ratios"))
    enough = dataset.held.values[dataset.pairs.values >= 32]
    held = [*enough.tolist(), float(dataset.squares_held)]
    pairs = f"{int(most.pairs)} pairs"
    return [
        _predicts(dataset),
        Claim(
            id="noise-scale/ratio-of-means",
            statement="The ratio of the means of |G|² and tr Σ over pairs of batches converges to "
            "the noise scale; the mean of the pairs' ratios does not.",
            source={"truth": 49.5, "ratio of means": 49.6, "mean of ratios": 68.2},
            measured={
                "truth": truth,
                f"ratio of means, median over experiments of {pairs}": float(means[1]),
                f"mean of ratios, median over experiments of {pairs}": float(ratios[1]),
            },
            tolerance=f"at {pairs}: the median of the ratio of means within 2 % of the truth, that "
            "of the mean of ratios at least 10 % above it",
            n_runs=repeats,
            interval={
                "ratio of means": means[[0, 2]].tolist(),
                "mean of ratios": ratios[[0, 2]].tolist(),
            },
            verdict=verdict(abs(means[1] / truth - 1) < 0.02 and ratios[1] > 1.1 * truth),
            evidence="noise_scale/estimators",
        ),
        Claim(
            id="noise-scale/interval-coverage",
            statement="95 % intervals of the noise scale from 32 or more pairs hold the truth as "
            "often as they say.",
            source="beyond the source",
            measured={
                "Gaussian gradients, by pairs": dict(
                    zip(map(str, dataset.pairs.values), dataset.held.values.tolist(), strict=True)
                ),
                "least squares, 64 pairs": held[-1],
            },
            tolerance=f"{COVERAGE[0]:.0%} to {COVERAGE[1]:.0%} for 32 pairs and more",
            n_runs=repeats * len(held),
            interval=None,
            verdict=verdict(all(COVERAGE[0] <= share <= COVERAGE[1] for share in held)),
            evidence="noise_scale/estimators",
        ),
    ]
