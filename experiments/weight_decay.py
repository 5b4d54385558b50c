"""Are an L2 penalty and weight decay the same thing, under SGD and under adaptive optimisers?"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax
import xarray as xr
from matplotlib.figure import Figure

from optjax.console import silent
from optjax.optimizers import rmsprop, with_weight_decay
from optjax.problems import least_squares
from optjax.report.claims import Claim, verdict
from optjax.report.style import COLOURS, band, caption, figure
from optjax.trajectory import make_run


@dataclass(frozen=True)
class Config:
    """Does l2 = λ/(2η) give the path of weight decay λ, and where does it stop doing so?

    Command: optjax run weight_decay. Cost: 10 s on two cores.
    Expect: equal to rounding under SGD; under RMSProp and Adam apart, the more so the more the
    features' scales spread.
    """

    seed: int = 0
    """Seed of the problems."""
    problems: int = 24
    """Random problems for each setting."""
    rows: int = 20
    """n, examples."""
    columns: int = 8
    """d, parameters."""
    sgd_steps: int = 200
    """Steps of the comparison under SGD."""
    adaptive_steps: int = 4000
    """Steps of the comparison under RMSProp and Adam."""
    rate: float = 0.01
    """Learning rate of the adaptive optimisers."""
    decay: float = 0.001
    """λ of the comparison under them."""
    spreads: tuple[int, ...] = (1, 3, 10, 30, 100)
    """Largest over smallest scale of a feature."""


def _optax_decoupled(learning_rate, weight_decay):
    return optax.chain(optax.add_decayed_weights(weight_decay), optax.sgd(learning_rate))


_sgd_decay = with_weight_decay(optax.sgd)
ADAPTIVE = {
    "RMSProp": (rmsprop, with_weight_decay(rmsprop)),
    "Adam": (optax.adam, with_weight_decay(optax.adam)),
}


def run(config: Config, progress: Callable[[str, float], None] = silent) -> xr.Dataset:
    """Relative distance between the paths of the two, under SGD and the adaptive optimisers."""
    with jax.enable_x64(True):
        return xr.merge([_sgd(config, progress), _adaptive(config, progress)], join="outer")


def _draw(config: Config):
    rng = np.random.default_rng(config.seed)
    k, n, d = config.problems, config.rows, config.columns
    return rng.normal(size=(k, n, d)), rng.normal(size=(k, d)), rng.normal(size=(k, n))


def _far(path: jax.Array, other: jax.Array) -> jax.Array:
    """Relative distance of two paths, step by step, without their common start."""
    norm = lambda w: jnp.linalg.norm(w[1:], axis=-1)  # noqa: E731
    return norm(path - other) / norm(other)


def _sgd(config: Config, progress: Callable[[str, float], None]) -> xr.Dataset:
    progress("SGD", 0.0)
    X, w, noise = _draw(config)
    t = np.einsum("knd,kd->kn", X, w) + noise
    rates, decays = np.array([0.1, 0.3, 0.8]), np.array([1e-4, 1e-3, 1e-2, 1e-1])

    def one(X, t, w0, share, decay):
        rate = share * X.shape[0] / jnp.linalg.norm(X, 2) ** 2
        problem = least_squares(X, t, w0)

        def path(factory, **hparams):
            run = make_run(problem, factory, config.sgd_steps, sampler="full", record_path=True)
            return run({"learning_rate": rate, **hparams}, jax.random.key(0)).path

        l2 = path(optax.sgd, l2=decay / (2 * rate))
        decayed = path(_sgd_decay, weight_decay=decay)
        decoupled = path(_optax_decoupled, weight_decay=decay / rate)
        # What the penalty would be if λ̃ were taken equal to λ: shows that the factor matters.
        naive = path(optax.sgd, l2=decay)
        return tuple(_far(p, decayed) for p in (l2, decoupled, naive))

    over = jax.vmap(one, (None, None, None, None, 0))
    over = jax.vmap(over, (None, None, None, 0, None))
    found = jax.jit(jax.vmap(over, (0, 0, 0, None, None)))(X, t, w[::-1].copy(), rates, decays)
    dims = ("problem", "rate_share", "decay", "sgd_step")
    names = ("sgd_l2", "sgd_decoupled", "sgd_naive")
    return xr.Dataset(
        {name: (dims, np.asarray(v)) for name, v in zip(names, found, strict=True)},
        {"rate_share": rates, "decay": decays, "sgd_step": np.arange(1, config.sgd_steps + 1)},
    )


def _adaptive(config: Config, progress: Callable[[str, float], None]) -> xr.Dataset:
    X, w, noise = _draw(config)
    d, spreads = config.columns, np.array(config.spreads, float)
    every = max(1, config.adaptive_steps // 100)
    steps = every * max(1, config.adaptive_steps // every)
    distance = np.empty((len(ADAPTIVE), len(spreads), config.problems, steps // every))
    spread = np.empty(distance.shape[:3])
    for i, (name, (plain, decayed)) in enumerate(ADAPTIVE.items()):
        progress(name, (i + 1) / (len(ADAPTIVE) + 1))

        def one(X, w, noise, factor, plain=plain, decayed=decayed):
            X = X * (factor ** jnp.linspace(-0.5, 0.5, d))[None]
            problem = least_squares(X, X @ w + 0.1 * noise, jnp.zeros(d))

            def path(factory, **hparams):
                run = make_run(problem, factory, steps, sampler="full", record_every=every,
                               record_path=True)  # fmt: skip
                return run({"learning_rate": config.rate, **hparams}, jax.random.key(0)).path

            l2 = path(plain, l2=config.decay / (2 * config.rate))
            wd = path(decayed, weight_decay=config.decay)
            # The root mean square of each coordinate's gradient along the path: what √v averages.
            residual = wd @ X.T - (X @ w + 0.1 * noise)[None]
            rms = jnp.sqrt(jnp.mean((residual @ X) ** 2, axis=0))
            return _far(l2, wd), jnp.max(rms) / jnp.min(rms)

        over = jax.vmap(jax.vmap(one, (0, 0, 0, None)), (None, None, None, 0))
        distance[i], spread[i] = jax.jit(over)(X, w, noise, spreads)
    dims = ("optimiser", "spread", "problem")
    return xr.Dataset(
        {
            "distance": ((*dims, "adaptive_step"), distance),
            "preconditioner_spread": (dims, spread),
        },
        {
            "optimiser": list(ADAPTIVE),
            "spread": spreads,
            "adaptive_step": every * np.arange(1, steps // every + 1),
        },
    )


def figures(dataset: xr.Dataset) -> dict[str, Figure]:
    """SGD: the paths coincide. RMSProp and Adam: the distance grows with the spread."""
    fig, ax = figure("single", height=3.4)
    x = dataset.sgd_step.values
    over = ("problem", "rate_share", "decay")
    for name, label, colour in (
        ("sgd_naive", "penalty λ̃ = λ (factor left out)", COLOURS[1]),
        ("sgd_l2", "penalty λ̃ = λ/(2η)", COLOURS[0]),
        ("sgd_decoupled", "optax's decoupled, wd = λ/η", COLOURS[2]),
    ):
        runs = np.maximum(dataset[name], 1e-17)
        style = "--" if name == "sgd_decoupled" else "-"  # it lies on the line before it
        ax.plot(x, runs.median(over), style, color=colour, label=label)
        band(ax, x, runs.min(over), runs.max(over), colour=colour)
    ax.set_yscale("log")
    ax.set(
        xlabel="step", ylabel="relative distance to the path of\nweight decay λ", ylim=(1e-17, 9)
    )
    ax.legend(frameon=False, fontsize=8, loc="center right")
    caption(fig, "Gradient descent: the paths of the penalty λ/(2η) and of weight decay λ coincide "
            "to rounding. Lines: medians over problems, rates and λ; bands: all.")  # fmt: skip

    wide, axes = figure("wide", 1, 2, sharey=True)
    for ax, name in zip(axes, dataset.optimiser.values.tolist(), strict=True):
        here = dataset.sel(optimiser=name)
        for i, s in enumerate(dataset.spread.values):
            one = here.sel(spread=s)
            ax.plot(one.preconditioner_spread, one.distance.isel(adaptive_step=-1), ".",
                    color=COLOURS[i], ms=6, label=f"{s:g}")  # fmt: skip
        ax.set(
            xscale="log",
            yscale="log",
            xlabel="spread of the RMS gradients, max / min over coordinates",
        )
        ax.set_title(name, fontsize=10)
    axes[0].set_ylabel("relative distance of the ends,\npenalty against decay")
    axes[1].legend(frameon=False, fontsize=8, title="spread of scales", title_fontsize=8)
    caption(wide, "Under adaptive optimisers the two end apart, a dot a problem; under gradient "
            "descent the distance is about 1e-15.")  # fmt: skip
    return {"gradient-descent": fig, "adaptive": wide}


def _ranks(x: np.ndarray) -> np.ndarray:
    _, place, count = np.unique(x, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count - 1) / 2)[place]


def _spearman(x: np.ndarray, y: np.ndarray) -> float:
    return float(np.corrcoef(_ranks(x.ravel()), _ranks(y.ravel()))[0, 1])


def claims(dataset: xr.Dataset) -> list[Claim]:
    """weight-decay/equivalence and weight-decay/adaptive-differs."""
    l2, decoupled = float(dataset.sgd_l2.max()), float(dataset.sgd_decoupled.max())
    same = Claim(
        id="weight-decay/equivalence",
        statement="The penalty λ̃‖w‖² under gradient descent is weight decay w ← (1 − λ)w − η∇L "
        "with λ̃ = λ/(2η), step for step.",
        source="λ̃ = λ/(2η)",
        measured={
            "largest relative distance along the path": l2,
            "the same for optax's decoupled decay, λ = η·wd": decoupled,
            "largest distance if λ̃ = λ were taken": float(dataset.sgd_naive.max()),
        },
        tolerance="1e-12 relative at every step (float64)",
        n_runs=int(np.prod(dataset.sgd_l2.shape[:3])),
        interval=None,
        verdict=verdict(l2 < 1e-12 and decoupled < 1e-12),
        evidence="weight_decay/gradient-descent",
    )
    measured, interval, grows, least = {}, {}, [], np.inf
    rng = np.random.default_rng(0)
    for name in dataset.optimiser.values.tolist():
        here = dataset.sel(optimiser=name)
        ends = here.distance.isel(adaptive_step=-1).values
        scales = np.broadcast_to(here.spread.values[:, None], ends.shape)
        rho = _spearman(scales, ends)
        # Problems are the independent units: each is kept with all its spreads.
        picks = rng.integers(0, ends.shape[1], (2000, ends.shape[1]))
        low, high = np.quantile([_spearman(scales, ends[:, p]) for p in picks], (0.025, 0.975))
        measured[f"{name}: Spearman correlation of distance and spread of scales"] = rho
        measured[f"{name}: the same with the spread of the coordinates' RMS gradients"] = _spearman(
            here.preconditioner_spread.values, ends
        )
        measured[f"{name}: median distance for each spread of scales"] = {
            f"{s:g}": float(np.median(e)) for s, e in zip(here.spread.values, ends, strict=True)
        }
        interval[f"{name}: Spearman correlation"] = [float(low), float(high)]
        grows.append(low > 0)
        least = min(least, float(ends.min()))
    measured["smallest relative distance of any pair of ends"] = least
    differs = least > 1e-6
    apart = Claim(
        id="weight-decay/adaptive-differs",
        statement="Under RMSProp and Adam the two differ, and the more so the wider the "
        "preconditioner spreads.",
        source="beyond the source",
        measured=measured,
        tolerance="every pair apart by more than 1e-6; the correlation's 95 % interval above 0",
        n_runs=dataset.distance.isel(adaptive_step=-1).size,
        interval=interval,
        verdict=verdict(differs and all(grows), reasoning=differs),
        evidence="weight_decay/adaptive",
    )
    return [same, apart]
