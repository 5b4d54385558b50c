"""Evolution strategies: the gradient of a smoothed number from its values alone.

    F(θ) = E f(θ + σε),   ∇F = E ε (f(θ + σε) − f(θ − σε)) / 2σ,   ε ~ N(0, I)

For runs that are chaotic, or not differentiable, and for hyperparameters that are not (a batch
size). Both of a pair see the same draws. The smoothed gradient is that of f itself where f is
quadratic; elsewhere they differ by O(σ²).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from optjax.hypergradients.job import Job, looks_inside, with_records
from optjax.hypergradients.mode import Footprint, Found, Mode
from optjax.run import core
from optjax.run.core import Outcome, Plan
from optjax.run.problems import Data
from optjax.support.errors import UserError, nearest, whole
from optjax.support.types import Array, HParams, Key, PyTree

_DIRECTIONS = 3  # folded into the run's key: a stream of its own; a run's are 0, 1, 2


_PERTURBED = (
    "a perturbed run diverged (take a smaller sigma)",
    "perturbed runs diverged at every point {tried}: take a smaller sigma",
)

Sigma = float | tuple[tuple[str, float], ...]


def deviations(theta: HParams, sigma: Sigma) -> HParams:
    """σ of every number: relative to it (or to 1 where it is 0), or absolute by name."""
    named: dict[str, float] = dict(sigma) if isinstance(sigma, tuple) else {}
    share = 0.01 if isinstance(sigma, tuple) else sigma

    def of(name: str, value: PyTree) -> PyTree:
        if name in named:
            return jax.tree.map(lambda v: jnp.full_like(v, named[name]), value)

        def relative(v: Array) -> Array:
            size = jax.lax.stop_gradient(jnp.abs(v))
            deviation = share * jnp.where(size > 0, size, jnp.ones_like(size))
            # A whole number must move by about one to move at all.
            return jnp.maximum(deviation, 1) if name == "batch_size" else deviation

        return jax.tree.map(relative, value)

    return {name: of(name, value) for name, value in theta.items()}


def sigma_of(value: Any) -> Sigma:
    """Return the argument `sigma` in a form that can be hashed.

    Raises:
      UserError: a deviation is not above 0.
    """
    numbers = value.items() if isinstance(value, Mapping) else [("sigma", value)]
    for name, number in numbers:
        if not isinstance(number, int | float) or not number > 0:
            raise UserError(f"{name} is {number!r}: expected a deviation above 0")
    return tuple(sorted(value.items())) if isinstance(value, Mapping) else float(value)


def as_run(plan: Plan, hparams: HParams) -> HParams:
    """Hyperparameters as a run takes them: a perturbed batch size becomes a whole one in range."""
    size = hparams.get("batch_size")
    if size is None or not plan.n:
        return hparams
    return {**hparams, "batch_size": jnp.clip(jnp.round(size), 1, plan.slots)}


def check_evolution(mode: Any, theta_names: frozenset[str]) -> None:
    """Check the arguments that both strategies take."""
    whole(f"{mode.name}: pairs", mode.pairs, 2)
    named = {} if isinstance(mode.sigma, float) else dict(mode.sigma)
    for name in sorted(set(named) - theta_names):
        raise UserError(f"sigma names {name!r}: {nearest(name, theta_names)}")


def mean_and_error(estimates: Array) -> tuple[Array, Array]:
    """Mean and standard error of estimates (N, P)."""
    count = estimates.shape[0]
    error = jnp.std(estimates, axis=0, ddof=1) / jnp.sqrt(jnp.asarray(count, estimates.dtype))
    return jnp.mean(estimates, axis=0), error


@dataclasses.dataclass(frozen=True)
class ES(Mode):
    """Antithetic evolution strategies (Rechenberg 1973; Salimans et al. 2017).

    The result's ``aux["standard_error"]`` is that of the gradient; the value is f(θ), unsmoothed.

    Args:
      pairs: N, of runs θ ± σε.
      sigma: deviation of a perturbation as a share of each number (σ itself where it is 0; at
        least 1 for a batch size), or absolute ones by name.
      at_once: pairs that run side by side; the others follow.
    """

    pairs: int = 64
    sigma: Any = 0.01
    at_once: int = 64

    name = "es"
    perturbs = True
    not_finite, never_finite = _PERTURBED

    def __post_init__(self) -> None:
        object.__setattr__(self, "sigma", sigma_of(self.sigma))

    def check(self, job: Job, names: frozenset[str]) -> None:
        """Pairs and deviations."""
        whole(f"{self.name}: at_once", self.at_once, 1)
        check_evolution(self, names)

    def bytes(self, job: Job, found: Footprint, numbers: int) -> int:
        """Count two runs for each pair at a time; a step leaves half of its residuals."""
        return (2 * found.state + found.step // 2) * min(self.at_once, self.pairs)

    def cost(self, job: Job, found: Footprint, numbers: int) -> float:
        """Count two runs a pair, and one without a perturbation."""
        return 2.0 * self.pairs + 1.0

    def __call__(self, job: Job, data: Data, theta: HParams, rest: HParams, key: Key) -> Found:
        flat, unravel = ravel_pytree(theta)
        sigma, _ = ravel_pytree(deviations(theta, self.sigma))

        def run(flat: Array) -> tuple[Array, Outcome]:
            return job.value(data, as_run(job.plan, {**rest, **unravel(flat)}), key)

        def pair(index: Array) -> Array:
            epsilon = _direction(key, index, flat)
            (above, _), (below, _) = (run(flat + s * sigma * epsilon) for s in (1, -1))
            return epsilon * (above - below) / (2 * sigma)

        indices = jnp.arange(self.pairs, dtype=jnp.int32)
        estimates = jax.lax.map(pair, indices, batch_size=min(self.at_once, self.pairs))
        slope, error = mean_and_error(estimates)
        value, outcome = run(flat)
        return Found(value, unravel(slope), outcome, {"standard_error": unravel(error)})


@dataclasses.dataclass(frozen=True)
class PES(Mode):
    """Persistent evolution strategies: a fresh perturbation a segment, all of them remembered.

        ĝ = (1/σ²N) Σ_i Σ_τ ξ_{i,τ} (L_τ(θ + ε…) − L_τ(θ − ε…))/2,   ξ_{i,τ} = ε_{i,1} + … + ε_{i,τ}

    A number that is a sum over the run ("mean_loss") is credited segment by segment, and each
    segment's perturbations answer only for what comes after them.

    Args:
      segment: K, steps of a segment; divides T.
      pairs, sigma: as `ES`.

    Source: Vicol, Metz, Sohl-Dickstein (2021), equation 10 and algorithm 2.
    """

    segment: int
    pairs: int = 64
    sigma: Any = 0.01

    name = "pes"
    perturbs = True
    not_finite, never_finite = _PERTURBED

    def __post_init__(self) -> None:
        object.__setattr__(self, "sigma", sigma_of(self.sigma))

    def check(self, job: Job, names: frozenset[str]) -> None:
        """Pairs, deviations, and segments that fit the run."""
        check_evolution(self, names)
        whole(f"{self.name}: segment", self.segment, 1)
        every = job.plan.record_every if looks_inside(job) else 1
        if job.plan.steps % self.segment or self.segment % every:
            raise UserError(
                f"segment is {self.segment}: expected a divisor of the run's {job.plan.steps} steps"
                + (f" and a multiple of record_every = {every}" if every > 1 else "")
            )

    def bytes(self, job: Job, found: Footprint, numbers: int) -> int:
        """Count two runs for each pair; a step leaves half of its residuals."""
        return (2 * found.state + found.step // 2) * self.pairs

    def cost(self, job: Job, found: Footprint, numbers: int) -> float:
        """Count two runs a pair, and one without a perturbation."""
        return 2.0 * self.pairs + 1.0

    def __call__(self, job: Job, data: Data, theta: HParams, rest: HParams, key: Key) -> Found:
        inner = job if looks_inside(job) else with_records(job, self.segment)
        plan, count = inner.plan, job.plan.steps // self.segment
        flat, unravel = ravel_pytree(theta)
        sigma, _ = ravel_pytree(deviations(theta, self.sigma))

        def hparams(flat: Array) -> HParams:
            return as_run(plan, {**rest, **unravel(flat)})

        def one(index: Array) -> Array:
            def direction(segment: Array) -> Array:
                return _direction(key, jnp.stack([index, segment]), flat)

            def advance(carry: Any, segment: Array) -> tuple[Any, Any]:
                states, sums = carry
                epsilon = direction(segment)
                sums = sums + epsilon
                ends, seen = [], []
                for sign, state in zip((1, -1), states, strict=True):
                    at = hparams(flat + sign * sigma * epsilon)
                    end, records = core.steps_of(plan, self.segment, data, at, state)
                    ends.append(end)
                    seen.append(records)
                gain = sums * jnp.mean(seen[0].loss - seen[1].loss).astype(flat.dtype)
                return (tuple(ends), sums), (gain, tuple(seen))

            first = direction(jnp.zeros((), jnp.int32))
            starts = tuple(
                core.init(plan, data, hparams(flat + sign * sigma * first), key) for sign in (1, -1)
            )
            segments = jnp.arange(count, dtype=jnp.int32)
            (ends, sums), (gains, seen) = jax.lax.scan(
                advance, (starts, jnp.zeros_like(flat)), segments
            )
            if job.averages:
                return jnp.mean(gains, axis=0) / (2 * sigma)
            last = flat + sigma * direction(segments[-1]), flat - sigma * direction(segments[-1])
            values = []
            for start, end, records, at in zip(starts, ends, seen, last, strict=True):
                joined = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), records)
                trajectory = core.finish(plan, data, hparams(at), start.params, end, joined)
                values.append(inner.judge(trajectory)[0])
            return sums * (values[0] - values[1]).astype(flat.dtype) / (2 * sigma)

        slope, error = mean_and_error(jax.vmap(one)(jnp.arange(self.pairs, dtype=jnp.int32)))
        value, outcome = job.value(data, hparams(flat), key)
        return Found(value, unravel(slope), outcome, {"standard_error": unravel(error)})


def _direction(key: Key, index: Array, like: Array) -> Array:
    """Draw the perturbation of a pair, or of a pair's segment, by its index."""
    stream = jax.random.fold_in(key, _DIRECTIONS)
    for i in jnp.atleast_1d(index):
        stream = jax.random.fold_in(stream, i)
    return jax.random.normal(stream, like.shape, like.dtype)
