"""The problems on which `noise_scale` predicts and measures, and those whose truth is known."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import xarray as xr

from optjax.batch_size.critical_batch_size import critical_batch_size
from optjax.batch_size.curvature_noise_scale import full_curvature_noise_scale
from optjax.batch_size.measured_noise_scale import per_example_noise_scale, two_batch_noise_scale
from optjax.batch_size.noise_scale import noise_scale, two_batch
from optjax.batch_size.recorded_noise_scale import with_noise_scale
from optjax.batch_size.steps_law import fit_critical_batch
from optjax.colourisation import networks
from optjax.colourisation.problem import colourisation_problem
from optjax.experiments.batch_problems import WholeLoss, drawn_tiles
from optjax.report.claims import mean_interval
from optjax.run.problems import Data, Metrics, Problem, least_squares
from optjax.run.trajectory import make_run
from optjax.support.machine import quick_jit
from optjax.support.types import Array, HParams, PyTree
from optjax.sweeps import sweep
from optjax.sweeps.stop_rules import Target
from optjax.theory.noisy_quadratic import noisy_quadratic, risk, step
from optjax.theory.quadratic_steps import fewest_steps

if TYPE_CHECKING:
    from optjax.experiments.noise_scale.run import Config

SCALES = ("simple", "curved", "averaged")
BOUND = ["low", "high"]
TRUTH = {"square": 1.0, "trace": 49.5}
"""|G|² and tr Σ of the Gaussian gradients with which ratios are compared."""


class Measurement(NamedTuple):
    """One problem and target: what was measured of it, and what was predicted."""

    name: str
    family: str
    sizes: np.ndarray  # (B,)
    steps: np.ndarray  # (B,) at the tuned rate
    fit: np.ndarray  # (3,) B_crit, and its 95 % interval
    scales: dict[str, np.ndarray]  # (3,) value, low, high of each of SCALES that is known
    S_min: float


# --------------------------------------------------------------------------- noisy quadratics


def quadratics(config: "Config") -> list[Measurement]:
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
        points.append(
            Measurement(name, "quadratic", sizes, steps, critical, scales, float(fit.S_min))
        )
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


def _squares_problem(config: "Config", noise: float) -> tuple[Problem, float]:
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


def squares(
    config: "Config", progress: Callable[[str, float], None]
) -> tuple[list[Measurement], xr.Dataset]:
    """Steps to the target, and scales along the largest batch's run at its tuned rate."""
    problems, swept, target = {}, {}, config.squares_target
    for i, noise in enumerate(config.noises):
        name, share = f"noise {noise:g}", 1 / len(config.noises)
        problems[name], cap = _squares_problem(config, noise)
        runs = sweep(
            make_run(problems[name], optax.sgd, config.squares_steps),
            {
                "batch_size": list(config.squares_batches),
                "learning_rate": np.geomspace(cap / 1000, cap, config.squares_rates),
            },
            config.squares_seeds,
            stop=Target(target, "excess"),
            progress=lambda text, f, i=i, share=share: progress(text, share * (i + f)),
        )
        swept[name] = critical_batch_size(runs, target, metric="excess", statistic="mean")
    # One program for all noises: the longest way, of which each takes its part.
    steps = {name: max(3, int(np.ceil(float(found.steps[-1])))) for name, found in swept.items()}
    any_problem = next(iter(problems.values()))
    once = make_run(with_noise_scale(any_problem), optax.sgd, max(steps.values()), record_path=True)

    def along(data: Data, rate: Array) -> tuple[Any, Any, Any]:
        problem = dataclasses.replace(any_problem, data=data)
        hparams = {"learning_rate": rate, "batch_size": config.squares_batches[-1]}
        runs = jax.vmap(lambda key: once.pure(data, hparams, key))(_keys(config.squares_seeds))
        path_STd = runs.path[:, 1:]  # from the first record on
        pairs = _at_each(_from_pairs, problem, path_STd[:1])
        return runs.metrics, _at_each(_curvature, problem, path_STd), pairs

    program, points, seen = quick_jit(along), [], []
    for name, found in swept.items():
        every = program(problems[name].data, jnp.float32(found.rate[-1]))
        metrics, curved_ST, pairs = jax.tree.map(
            lambda a, T=steps[name]: np.asarray(a, float)[:, :T], every
        )
        scales = _over_seeds(metrics) | {"curved": _middle(curved_ST.value.mean(1))}
        points.append(_point(name, "squares", found, scales))
        ends = np.stack([pairs.low[0], pairs.high[0]], -1)
        seen.append(
            xr.Dataset(
                {
                    "squares_exact": ("squares_step", _ratio(metrics)[0]),
                    "squares_pairs": ("squares_step", pairs.value[0]),
                    "squares_pairs_interval": (("squares_step", "bound"), ends),
                    "squares_curved": ("squares_step", curved_ST.value[0]),
                },
                {"squares_step": np.arange(1, steps[name] + 1), "bound": BOUND},
                {"squares_shown": name},
            )
        )
    return points, seen[len(seen) // 2]


def _keys(count: int) -> Any:
    return jax.vmap(jax.random.key)(jnp.arange(count))


def _curvature(problem: Problem, w: Array, key: Any) -> Any:
    return full_curvature_noise_scale(problem, w, key, probes=32)


def _from_pairs(problem: Problem, w: Array, key: Any) -> Any:
    return two_batch_noise_scale(problem, w, key, batch_size=4, groups=8, pairs=64)


def _at_each(scale: Callable[..., Any], problem: Problem, path_STd: Array) -> Any:
    """A scale at every point of paths, with keys of their own, (S, T) each."""
    S, T = path_STd.shape[:2]
    of = jax.vmap(jax.vmap(lambda w, key: scale(problem, w, key)))
    return of(path_STd, _keys(S * T).reshape(S, T))


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


def _point(name: str, family: str, found: xr.Dataset, scales: dict[str, np.ndarray]) -> Measurement:
    fit = np.array([float(found.B_crit), *found.B_crit_interval.values])
    sizes, steps = found.batch_size.values, found.steps.values
    return Measurement(name, family, sizes, steps, fit, scales, float(found.S_min))


# -------------------------------------------------------------------------------------- network


def net(
    config: "Config", progress: Callable[[str, float], None]
) -> tuple[list[Measurement], xr.Dataset]:
    """Steps to every target, and scales along the largest batch's run to the hardest."""
    tiles = drawn_tiles(
        config.data, config.pictures, config.seed, config.net_batches, size=16,
        colours=config.colours,
    )  # fmt: skip
    net = networks.model("conv-transpose", filters=config.filters, colours=config.colours)
    problem = colourisation_problem(net, tiles)
    problem = dataclasses.replace(problem, metrics=WholeLoss(problem.loss))
    every, hardest = config.net_every, min(config.net_targets)
    most = every * (config.net_steps // every)
    swept = sweep(
        make_run(problem, optax.sgd, most, record_every=every),
        {
            "batch_size": list(config.net_batches),
            "learning_rate": np.geomspace(*config.net_span, config.net_rates),
        },
        config.net_seeds,
        stop=Target(hardest, "whole_loss"),
        progress=progress,
    )
    found = {
        target: critical_batch_size(swept, target, metric="whole_loss", statistic="mean")
        for target in config.net_targets
    }
    # One run, to the hardest target: the way to the others is its beginning.
    last = found[hardest]
    records = {t: max(2, int(np.ceil(float(f.steps[-1]) / every))) for t, f in found.items()}
    recorded = with_noise_scale(problem, config.net_blocks)
    once = make_run(recorded, optax.sgd, every * records[hardest], record_every=every)
    hparams = {"learning_rate": float(last.rate[-1]), "batch_size": config.net_batches[-1]}
    every_seed = jax.vmap(lambda key: once(hparams, key))
    metrics = quick_jit(every_seed)(_keys(config.net_scale_seeds)).metrics
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


def ratios(config: "Config") -> xr.Dataset:
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


def coverage(config: "Config") -> xr.Dataset:
    """How many intervals of `two_batch_noise_scale` hold the truth of the least squares' data."""
    problem, _ = _squares_problem(config, config.noises[len(config.noises) // 2])
    w = jnp.zeros(config.columns, jnp.float32)
    truth = float(per_example_noise_scale(problem, w, exact=True).value)
    of = quick_jit(jax.vmap(lambda key: _from_pairs(problem, w, key)))
    found = of(_keys(config.repeats))
    held = np.mean((found.low <= truth) & (truth <= found.high))
    return xr.Dataset({"squares_held": float(held), "squares_truth": truth})
