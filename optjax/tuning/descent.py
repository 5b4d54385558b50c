"""`oj.tune`: descend on the hyperparameters, many starts at once."""

import dataclasses
import json
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optjax import files, provenance
from optjax.console import Console
from optjax.errors import UserError
from optjax.hypergradients import hypergrad
from optjax.hypergradients import memory as footprints
from optjax.hypergradients.gradient import HypergradFn
from optjax.hypergradients.job import Mode, Of
from optjax.problems import Data
from optjax.trajectory import Run
from optjax.tuning import space as spaces
from optjax.tuning.book import Book
from optjax.tuning.space import Range, Space, named_leaves
from optjax.types import Array, HParams, PyTree

if TYPE_CHECKING:
    import xarray
    from matplotlib.figure import Figure

Progress = Callable[[str, float], None]


class Climber(NamedTuple):
    """Where one start has come to."""

    u: HParams  # the point to look at next
    good: HParams  # the last one whose runs stayed finite
    opt_state: PyTree


@dataclasses.dataclass(frozen=True)
class Tuning:
    """What `oj.tune` found.

    Attributes:
      hparams: the best point, with what was not tuned beside it: what a run takes.
      value: of it, the mean over the seeds.
      path: a Dataset with axes ``restart`` and ``outer_step``: ``value``, ``finite``, and every
        tuned hyperparameter (a schedule or array with an axis of its own).
    """

    hparams: dict[str, Any]
    value: float
    path: "xarray.Dataset"

    def figure(self) -> "Figure":
        """The value and the hyperparameters along the outer steps, all restarts, the best bold."""
        from optjax.tuning.picture import picture

        return picture(self.path)


class TuningInterrupted(KeyboardInterrupt):
    """Ctrl-C: ``.tuning`` holds what was found until then."""

    def __init__(self, tuning: Tuning) -> None:
        super().__init__("interrupted; .tuning holds what was found")
        self.tuning = tuning


def tune(
    run: Run,
    of: Of,
    hparams: HParams,
    outer: optax.GradientTransformation | None = None,
    *,
    steps: int = 100,
    wrt: str | Iterable[str] | None = None,
    constraints: Mapping[str, Range | None] | None = None,
    seeds: int | Iterable[int] = 1,
    fresh_seeds: bool = False,
    restarts: int = 1,
    spread: float = 1.0,
    seed: int = 0,
    mode: str | Mode = "auto",
    out: str | Path | None = None,
    progress: Progress | None = None,
) -> Tuning:
    """Tune hyperparameters by gradient descent, u ← u + outer(dF/du), θ = θ(u).

    u is log θ for a positive hyperparameter and logit θ for a share (momentum, b1, …), so no step
    leaves the range and a step is relative. Where a point's runs diverge, the next is half-way
    back to the last that did not.

    Args:
      run, of, mode: as `oj.hypergrad`; F is its value, averaged over the seeds.
      hparams: the start; what is not tuned stays. A rate that changes along a run: `Schedule`.
      outer: descends on u; Adam of rate 0.1 by default (a tenth of θ a step, at first).
      steps: outer steps.
      wrt: names to tune; all but the batch size by default.
      constraints: name → (low, high), or None for any number. By default (0, 1) for momentum, b1
        and other shares, (0, ∞) where the start is positive.
      seeds: how many, 0, 1, …; or which. The runs of all points see the same draws.
      fresh_seeds: new seeds at every outer step: F is then the mean over all runs there could be,
        and the last point, not the best seen, is the result.
      restarts: starts, all at once: the given one, and others drawn about it in u.
      spread: their standard deviation in u: 1 is a factor of e.
      seed: of these draws.
      out: a netCDF file that keeps the path and the state; the same call again goes on, or takes
        more outer steps.
      progress: called with (text, fraction); a bar or lines on stderr by default.

    Returns:
      A `Tuning`; ``.figure()`` draws it.

    Raises:
      UserError: as `oj.hypergrad`; a start outside its range; no start whose runs stay finite.
      TuningInterrupted: on Ctrl-C, with what was found.

    >>> import jax, optax, optjax as oj
    >>> problem = oj.least_squares([[2.0, 1.0], [0.0, 1.0]], [2.0, 1.0])
    >>> run = oj.make_run(problem, optax.sgd, steps=10, sampler="full")
    >>> found = oj.tune(run, "final_loss", {"learning_rate": 0.01}, steps=30)
    >>> bool(found.value < run({"learning_rate": 0.01}, jax.random.key(0)).final_loss / 10)
    True

    Sources: Bengio (2000); Maclaurin et al. (2015).
    """
    if steps < 1:
        raise UserError(f"steps is {steps}: expected at least 1 outer step")
    if restarts < 1:
        raise UserError(f"restarts is {restarts}: expected at least 1")
    if spread < 0:
        raise UserError(f"spread is {spread:g}: expected 0 or more")
    gradient = hypergrad(run, of, wrt, mode)
    theta, rest = gradient.parted(hparams)
    space = spaces.make_space(theta, constraints or {})
    chosen = np.arange(seeds) if isinstance(seeds, int) else np.asarray(list(seeds))
    if not len(chosen):
        raise UserError("seeds is empty: expected at least one")
    outer = optax.adam(0.1) if outer is None else outer
    settings = {
        "of": gradient.job.name, "start": files.plain(jax.tree.map(np.asarray, dict(theta))),
        "rest": files.plain(jax.tree.map(np.asarray, dict(rest))), "ranges": str(space.ranges),
        "seeds": chosen.tolist(), "fresh_seeds": fresh_seeds, "restarts": restarts,
        "spread": spread, "seed": seed, "inner_steps": run.plan.steps, "mode": str(gradient.mode),
    }  # fmt: skip
    outer_loop = _Loop(gradient, space, outer, theta, rest, chosen, fresh_seeds)
    state = outer_loop.start(restarts, spread, seed)
    book = Book(theta, space, dict(rest), settings, None if out is None else Path(out))
    state = book.resumed(state)
    begin = time.perf_counter()

    def found() -> Tuning:
        path = book.dataset()
        path.attrs |= {
            "settings": json.dumps(settings, default=str), "commit": provenance.commit(),
            "versions": json.dumps(provenance.versions()), "seconds": time.perf_counter() - begin,
        }  # fmt: skip
        hparams, value = book.best(last=fresh_seeds)
        return Tuning(hparams, value, path)

    with Console().late("tune") as late:
        tell = progress or late
        try:
            for k in range(book.done, steps):
                state, seen = outer_loop.step(state, k)
                book.add(state, seen)
                tell(f"outer step {k + 1} of {steps}, best {book.least():.4g}", (k + 1) / steps)
        except KeyboardInterrupt:
            if not book.done:
                raise
            book.save()
            raise TuningInterrupted(found()) from None
    book.save()
    return found()


class _Loop:
    """The outer steps, compiled once."""

    def __init__(
        self,
        gradient: HypergradFn,
        space: Space,
        outer: optax.GradientTransformation,
        theta: HParams,
        rest: HParams,
        seeds: np.ndarray,
        fresh: bool,
    ) -> None:
        self.gradient, self.space, self.outer = gradient, space, outer
        self.theta, self.rest = theta, rest
        self.seeds, self.fresh = seeds, fresh
        self._step = jax.jit(self._all)

    def start(self, restarts: int, spread: float, seed: int) -> Climber:
        """The given start first, the others drawn about it."""
        centre = self.space.outside(self.theta)
        leaves, structure = jax.tree.flatten(centre)
        rng = np.random.default_rng(seed)
        moved = []
        for leaf in leaves:
            shift = spread * rng.normal(size=(restarts, *leaf.shape))
            shift[0] = 0
            moved.append(leaf[None] + jnp.asarray(shift, leaf.dtype))
        u = jax.tree.unflatten(structure, moved)
        good = jax.tree.map(lambda c: jnp.broadcast_to(c, (restarts, *c.shape)), centre)
        return Climber(u, good, jax.vmap(self.outer.init)(u))

    def step(self, state: Climber, k: int) -> tuple[Climber, dict[str, Any]]:
        """One outer step of every start; what was seen at the points before it."""
        seeds = self.seeds + (k * len(self.seeds) if self.fresh else 0)
        seen: dict[str, Any]
        state, seen = self._step(self.gradient.run.problem.data, state, jnp.asarray(seeds))
        return state, {name: np.asarray(v) for name, v in seen.items()}

    def _all(self, data: Data, state: Climber, seeds: Array) -> tuple[Climber, dict[str, Array]]:
        restarts = jax.tree.leaves(state.u)[0].shape[0]
        mode = self.gradient.chosen(data, self.theta, self.rest)
        fit = footprints.lanes(mode, self.gradient.job, data, self.theta, self.rest)
        at_once = fit // len(seeds)
        # The given seeds are one lane's work: all restarts side by side where memory allows.
        return jax.lax.map(
            lambda one: self._one(data, one, seeds),
            state,
            batch_size=max(1, min(restarts, at_once)),
        )

    def _one(self, data: Data, state: Climber, seeds: Array) -> tuple[Climber, dict[str, Array]]:
        theta = self.space.inside(state.u)
        hparams = {**self.rest, **theta}
        each = jax.vmap(lambda s: self.gradient.pure(data, hparams, jax.random.key(s)))(seeds)
        value = jnp.mean(each.value)
        finite = jnp.all(each.finite)
        slope = jax.tree.map(lambda g: jnp.mean(g, axis=0), each.gradient)
        by_u = self.space.pulled_back(state.u, slope)
        by_u = jax.tree.map(lambda g: jnp.where(finite, g, jnp.zeros_like(g)), by_u)
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            updates, opt_state = self.outer.update(by_u, state.opt_state, state.u)
        ahead = optax.apply_updates(state.u, updates)
        back = jax.tree.map(lambda u, g: g + 0.5 * (u - g), state.u, state.good)

        def pick(new: PyTree, old: PyTree) -> PyTree:
            return jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)

        after = Climber(
            pick(ahead, back), pick(state.u, state.good), pick(opt_state, state.opt_state)
        )
        flat = jnp.concatenate([jnp.ravel(g) for g in jax.tree.leaves(by_u)])
        seen = {
            "value": jnp.where(finite, value, jnp.nan),
            "finite": finite,
            "gradient_norm": jnp.linalg.norm(flat),
            **named_leaves(theta),
        }
        if len(seeds) > 1:
            spread = jnp.std(each.value, ddof=1)
            seen["value_error"] = spread / jnp.sqrt(jnp.asarray(len(seeds), spread.dtype))
        return after, seen
