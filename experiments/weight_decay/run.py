"""Are an L2 penalty and weight decay the same thing, under SGD and under adaptive optimisers?"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax
import xarray as xr

from optjax.experiments.weight_decay.claims import claims as claims
from optjax.experiments.weight_decay.figures import figures as figures
from optjax.hypergradients import hypergrad
from optjax.run.optimizers import with_weight_decay
from optjax.run.problems import least_squares
from optjax.run.trajectory import make_run
from optjax.support.console import silent

RMSPROP = functools.partial(optax.rmsprop, eps_in_sqrt=False)
"""RMSProp as the source writes it: ε outside the root."""


@dataclass(frozen=True)
class Config:
    """Does l2 = λ/(2η) give the path of weight decay λ, and where does it stop doing so?

    Command: optjax run weight_decay. Cost: 15 s on two cores.
    Expect: paths and hypergradients equal to rounding under SGD; under RMSProp and Adam apart, the
    more so the more the features' scales spread.
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
    hyper_steps: int = 100
    """Steps of the hypergradients under them: while they descend, before they ring."""
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
    "RMSProp": (RMSPROP, with_weight_decay(RMSPROP)),
    "Adam": (optax.adam, with_weight_decay(optax.adam)),
}


def run(config: Config, progress: Callable[[str, float], None] = silent) -> xr.Dataset:
    """Distances of the two's paths and hypergradients, under SGD and the adaptive optimisers."""
    with jax.enable_x64(True):
        parts = [_sgd(config, progress), _sgd_slopes(config, progress)]
        parts += [_adaptive(config, progress), _adaptive_slopes(config, progress)]
        return xr.merge(parts, join="outer")


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


def _sgd_slopes(config: Config, progress: Callable[[str, float], None]) -> xr.Dataset:
    """How far the hypergradients by λ and by λ̃ = λ/(2η) are from what the chain rule says."""
    progress("SGD: hypergradients", 0.2)
    X, w, noise = _draw(config)
    t = np.einsum("knd,kd->kn", X, w) + noise

    def one(X, t, w0, share, decay, key, size):
        rate = share * X.shape[0] / jnp.linalg.norm(X, 2) ** 2
        penalty, problem = decay / (2 * rate), least_squares(X, t, w0)

        def slopes(factory, **hparams):
            run = make_run(problem, factory, config.sgd_steps, max_batch_size=size)
            slope = hypergrad(run, mode="forward")({"learning_rate": rate, **hparams}, key)
            return slope.gradient

        by_decay = slopes(_sgd_decay, weight_decay=decay)
        by_l2 = slopes(optax.sgd, l2=penalty)
        scaled = by_l2["l2"] / (2 * rate)
        # At λ held, λ̃ moves with η: dL/dη|λ = dL/dη|λ̃ + dL/dλ̃ · dλ̃/dη.
        terms = jnp.stack([by_decay["learning_rate"], by_l2["learning_rate"],
                           -by_l2["l2"] * penalty / rate])  # fmt: skip
        gap = jnp.abs(terms[0] - terms[1] - terms[2]) / jnp.max(jnp.abs(terms))
        left_out = jnp.abs(terms[2]) / jnp.max(jnp.abs(terms[:2]))
        return jnp.abs(scaled / by_decay["weight_decay"] - 1), gap, left_out

    rates, decays = np.array([0.1, 0.3]), np.array([1e-4, 1e-3, 1e-2])
    keys = jax.random.split(jax.random.key(config.seed), config.problems)
    found = []
    for size in (None, 5):
        over = lambda *args, size=size: one(*args, size)  # noqa: E731
        over = jax.vmap(over, (None, None, None, None, 0, None))
        over = jax.vmap(over, (None, None, None, 0, None, None))
        over = jax.vmap(over, (0, 0, 0, None, None, 0))
        found.append(jax.jit(over)(X, t, w[::-1].copy(), rates, decays, keys))
    dims = ("batch", "problem", "slope_rate", "slope_decay")
    names = ("slope_by_decay", "slope_by_rate", "slope_chain_term")
    return xr.Dataset(
        {
            name: (dims, np.array(v))
            for name, v in zip(names, zip(*found, strict=True), strict=True)
        },
        {"batch": ["all examples", "5 examples"], "slope_rate": rates, "slope_decay": decays},
    )


def _scaled(config: Config, X: jax.Array, w: jax.Array, noise: jax.Array, factor: jax.Array):
    """X with columns whose scales spread by the factor, and its targets."""
    X = X * (factor ** jnp.linspace(-0.5, 0.5, config.columns))[None]
    return X, X @ w + 0.1 * noise


def _adaptive_slopes(config: Config, progress: Callable[[str, float], None]) -> xr.Dataset:
    """The cosine of dL/dλ and (1/2η) dL/dλ̃, one λ for each parameter, and the ratio of sums."""
    progress("adaptive: hypergradients", 0.9)
    X, w, noise = _draw(config)
    spreads = np.array(config.spreads, float)

    def one(X, w, noise, factor, plain, decayed):
        X, t = _scaled(config, X, w, noise, factor)
        problem = least_squares(X, t, jnp.zeros(config.columns))
        each = jnp.full(config.columns, config.decay)

        def slope(factory, **hparams):
            run = make_run(problem, factory, config.hyper_steps, sampler="full")
            by = hypergrad(run, wrt=tuple(hparams), mode="forward")
            found = by({"learning_rate": config.rate, **hparams}, jax.random.key(0))
            return next(iter(found.gradient.values()))

        a = slope(decayed, weight_decay=each)
        b = slope(plain, l2=each / (2 * config.rate)) / (2 * config.rate)
        return a @ b / jnp.linalg.norm(a) / jnp.linalg.norm(b), jnp.sum(b) / jnp.sum(a)

    found = []
    for pair in ({"SGD": (optax.sgd, _sgd_decay)} | ADAPTIVE).values():
        over = lambda *args, pair=pair: one(*args, *pair)  # noqa: E731
        over = jax.vmap(jax.vmap(over, (0, 0, 0, None)), (None, None, None, 0))
        found.append(jax.jit(over)(X, w, noise, spreads))
    cosine, ratio = (np.array(v) for v in zip(*found, strict=True))
    dims = ("rule", "spread", "problem")
    return xr.Dataset(
        {"slope_cosine": (dims, cosine), "slope_ratio": (dims, ratio)},
        {"rule": ["SGD", *ADAPTIVE], "spread": spreads},
    )


def _adaptive(config: Config, progress: Callable[[str, float], None]) -> xr.Dataset:
    X, w, noise = _draw(config)
    spreads = np.array(config.spreads, float)
    every = max(1, config.adaptive_steps // 100)
    steps = every * max(1, config.adaptive_steps // every)
    distance = np.empty((len(ADAPTIVE), len(spreads), config.problems, steps // every))
    spread = np.empty(distance.shape[:3])
    for i, (name, (plain, decayed)) in enumerate(ADAPTIVE.items()):
        progress(name, (i + 1) / (len(ADAPTIVE) + 1))

        def one(X, w, noise, factor, plain=plain, decayed=decayed):
            X, t = _scaled(config, X, w, noise, factor)
            problem = least_squares(X, t, jnp.zeros(config.columns))

            def path(factory, **hparams):
                run = make_run(problem, factory, steps, sampler="full", record_every=every,
                               record_path=True)  # fmt: skip
                return run({"learning_rate": config.rate, **hparams}, jax.random.key(0)).path

            l2 = path(plain, l2=config.decay / (2 * config.rate))
            wd = path(decayed, weight_decay=config.decay)
            # The root mean square of each coordinate's gradient along the path: what √v averages.
            residual = wd @ X.T - t[None]
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
