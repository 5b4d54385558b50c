"""A tuning as a computation: a step of it is an outer step of every restart."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optjax.hypergradients.hypergradient import HypergradientComputation
from optjax.run.computation import Finished
from optjax.run.core import Status
from optjax.run.problems import Data
from optjax.support.keys import make_key
from optjax.support.types import Array, HParams, Key, PyTree
from optjax.tuning.space import Space, named_leaves


class Restart(NamedTuple):
    """Where one restart has come to."""

    u: HParams  # the point to look at next
    good: HParams  # its last point whose runs stayed finite
    known: Array  # () bool, whether there is one
    opt_state: PyTree


class TuningState(NamedTuple):
    """Where a tuning has come to."""

    step: Any  # () int32, outer steps done
    restarts: Restart  # leaves (restarts, ...)
    best: HParams  # the best point seen
    value: Array  # () of it times the sign; infinite before there is one
    diverged_at: Array  # () int32, always −1: a restart comes back


@dataclasses.dataclass(frozen=True)
class TuningComputation:
    """A tuning as `optjax.sweeps` carries it out: see `Computation`.

    Its hyperparameters are ``start``, the points in u that the restarts begin at, and those that
    are not tuned.

    Args:
      together: restarts side by side. seeds_together: runs of a restart side by side.
      seeds: of the runs of a point; larger by `stride` at every outer step.
      sign: 1 to make the value small, −1 to make it large.
    """

    gradient: HypergradientComputation
    space: Space
    outer: optax.GradientTransformation
    together: int
    seeds_together: int
    seeds: tuple[int, ...]
    stride: int
    sign: int

    @property
    def turns(self) -> int:
        """Steps of the runs within an outer step, which XLA's count of operations leaves out."""
        return self.gradient.job.plan.steps * len(self.seeds)

    def start(self, data: Data, hparams: HParams, key: Key) -> TuningState:
        """As `Computation.start`."""
        u = jax.tree.map(jnp.asarray, hparams["start"])
        leaves = jax.tree.leaves(u)
        known = jnp.zeros(leaves[0].shape[0], bool)
        opt_state = jax.tree.map(jnp.asarray, jax.vmap(self.outer.init)(u))
        first = jax.tree.map(lambda leaf: leaf[0], u)
        zero = jnp.zeros((), jnp.int32)
        value = jnp.asarray(jnp.inf, leaves[0].dtype)
        return TuningState(zero, Restart(u, u, known, opt_state), first, value, zero - 1)

    def advance(
        self, data: Data, hparams: HParams, state: TuningState, steps: Array
    ) -> tuple[TuningState, dict[str, Array]]:
        """As `Computation.advance`: one outer step, and what was seen at the points before it."""
        restarts = state.restarts
        fixed = {name: value for name, value in hparams.items() if name != "start"}
        seeds = jnp.asarray(self.seeds, jnp.int32) + self.stride * state.step
        seen, slope = jax.lax.map(
            lambda u: self._look(data, fixed, u, seeds), restarts.u, batch_size=self.together
        )
        values = jnp.where(seen["finite"], self.sign * seen["value"], jnp.inf).astype(
            state.value.dtype
        )
        r = jnp.argmin(values)
        best = _pick(values[r] < state.value, jax.tree.map(lambda u: u[r], restarts.u), state.best)
        value = jnp.minimum(values[r], state.value)
        move = functools.partial(_moved, self, best, jnp.isfinite(value))
        restarts = jax.vmap(move)(restarts, slope, seen["finite"])
        state = TuningState(state.step + 1, restarts, best, value, state.diverged_at)
        return state, {**seen, BEST: self.sign * value}

    def finish(self, data: Data, hparams: HParams, state: TuningState) -> Finished:
        """As `Computation.finish`: the best value seen."""
        status = jnp.full((), Status.COMPLETED, jnp.int32)
        return Finished(status, state.diverged_at, {"best value": self.sign * state.value})

    def _look(
        self, data: Data, fixed: HParams, u: HParams, seeds: Array
    ) -> tuple[dict[str, Array], HParams]:
        """Compute a point's value and the like, and ± dF/du (0 where it is not finite)."""
        theta = self.space.inside(u)

        def alone(seed: Array) -> Any:
            return self.gradient(data, {**fixed, **theta}, make_key(seed))

        each = jax.lax.map(alone, seeds, batch_size=min(len(seeds), self.seeds_together))
        by_u = self.space.pulled_back(u, jax.tree.map(lambda g: jnp.mean(g, axis=0), each.gradient))
        # Squares, as optimisers keep them: where they overflow a step of Adam would be 0 for good.
        squares = sum(jnp.sum(g * g) for g in jax.tree.leaves(by_u))
        finite = jnp.all(each.finite) & jnp.isfinite(squares)
        seen = {
            "value": jnp.where(finite, jnp.mean(each.value), jnp.nan),
            "finite": finite,
            "diverged": jnp.any(each.status == Status.DIVERGED),
            "gradient_norm": jnp.where(finite, jnp.sqrt(squares), jnp.nan),
            **named_leaves(theta),
        }
        if len(seeds) > 1:
            spread = jnp.std(each.value, ddof=1)
            error = spread / jnp.sqrt(jnp.asarray(len(seeds), spread.dtype))
            seen["value_error"] = jnp.where(finite, error, jnp.nan)
        return seen, jax.tree.map(
            lambda g: jnp.where(finite, self.sign * g, jnp.zeros_like(g)), by_u
        )


BEST = "best so far"
"""What a tuning records of all its restarts together."""


@dataclasses.dataclass(frozen=True)
class NeverFinite:
    """Stop a tuning that has met no finite run in its first outer steps."""

    steps: int
    name: str = dataclasses.field(default="never finite", init=False)
    metric: str = dataclasses.field(default=BEST, init=False)

    def init(self) -> PyTree:
        return ()

    def update(self, state: PyTree, step: Array, values: dict[str, Array]):
        return state, (step >= self.steps) & ~jnp.isfinite(values[BEST])


@dataclasses.dataclass(frozen=True)
class NoSlope:
    """Stop a tuning whose objective has no slope at any of its points."""

    name: str = dataclasses.field(default="no slope", init=False)
    metric: str = dataclasses.field(default=BEST, init=False)

    def init(self) -> PyTree:
        return ()

    def update(self, state: PyTree, step: Array, values: dict[str, Array]):
        return state, jnp.all(values["gradient_norm"] == 0)


def starts(u: HParams, restarts: int, spread: float, seed: int) -> HParams:
    """Draw the starts about the given one, which is the first: leaves (restarts, ...)."""
    rng = np.random.default_rng(seed)

    def about(leaf: Array) -> np.ndarray:
        shift = spread * rng.normal(size=(restarts, *leaf.shape))
        shift[0] = 0
        return np.asarray(leaf)[None] + shift.astype(leaf.dtype)

    return jax.tree.map(about, u)


def _moved(
    tuning: TuningComputation,
    best: HParams,
    found: Array,
    one: Restart,
    slope: HParams,
    finite: Array,
) -> Restart:
    """Take a step of the outer optimiser; from a point that diverged, go half-way back."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        updates, opt_state = tuning.outer.update(slope, one.opt_state, one.u)
        ahead = optax.apply_updates(one.u, updates)
    sound = finite & jnp.all(
        jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(ahead)])
    )
    home = _pick(one.known, one.good, best)
    half = jax.tree.map(lambda u, h: h + 0.5 * (u - h), one.u, home)
    back = _pick(one.known | found, half, tuning.space.shrunk(one.u))
    return Restart(
        _pick(sound, ahead, _pick(finite, one.u, back)),
        _pick(finite, one.u, one.good),
        one.known | finite,
        _pick(sound, opt_state, one.opt_state),
    )


def _pick(which: Array, new: PyTree, old: PyTree) -> PyTree:
    return jax.tree.map(lambda a, b: jnp.where(which, a, b), new, old)
