"""η* along a run: at every step of SGD the learning rate that is best for that step.

On a quadratic loss this is exact; elsewhere it minimises the second-order model of the loss. It is
short-sighted: `optjax.theory.quadratic_rates` says how much worse than the best schedule it ends.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optjax.run import core
from optjax.run.batching import Batch, Sampler
from optjax.run.core import Plan, RunState
from optjax.run.problems import Data, Problem
from optjax.run.trajectory import make_run
from optjax.support.errors import UserError
from optjax.support.types import Array, HParams, Key, PyTree

_TOGETHER = 32  # examples whose gradients and Hessian-vector products are taken at once


class GreedyRun(NamedTuple):
    """A run of SGD whose learning rates were chosen step by step."""

    rates: Array  # (T,)
    losses: Array  # (T + 1,) over all training data, before the first step and after each
    params: PyTree  # final parameters


def greedy_learning_rates(
    problem: Problem,
    steps: int,
    hparams: HParams,
    key: Key,
    *,
    max_rate: ArrayLike = jnp.inf,
    sampler: Sampler = "replacement",
) -> GreedyRun:
    """Run SGD with, at each step, the learning rate of least expected loss after it.

    η* = ‖g‖²/(gᵀHg + tr(HC_b)), with g and H gradient and Hessian of the loss over all training
    data, C_b the covariance of the mini-batch gradient: C/b for one drawn with replacement,
    C/b · (n − b)/(n − 1) for a part of a permutation, 0 for a step on all examples.

    Exact where the loss is quadratic and the mini-batch loss averages to the objective: no batch
    statistics, no dropout. A step costs a gradient and a Hessian-vector product over all n
    examples; with mini-batches also n gradients of one example, (n, d) numbers, and n more such
    products, which is O(n²) gradients a step: for small n.

    Args:
      problem: what is minimised. Without examples its noise must be that of `quadratic`, whose
        squares are the diagonal of C.
      steps: T.
      hparams: ``batch_size``, for steps on mini-batches; ``l2`` and what the problem itself reads.
        The penalty is part of the loss that is minimised and reported. No ``learning_rate``.
      key: of the run: ``make_run(problem, optax.sgd, T)`` with the chosen rates as its schedule
        sees the same batches and takes the same steps.
      max_rate: (), no rate is above it; and the rate where the loss curves down along the
        gradient, so that it has no minimum there. Give one for a loss that is not convex.
      sampler: as `make_run` takes it. For parts of a permutation C_b is that of a part on its own,
        whatever has been seen of the epoch, and of b examples also where an epoch's last has less.

    Raises:
      UserError: what `make_run` refuses; a learning rate, momentum or example_weights among the
        hyperparameters; a problem whose noise is unknown.

    >>> import jax, optjax as oj
    >>> problem = oj.least_squares([[2.0, 1.0], [0.0, 1.0]], [2.0, 1.0])
    >>> found = greedy_learning_rates(problem, 3, {}, jax.random.key(0))
    >>> bool((found.losses[1:] < found.losses[:-1]).all())
    True

    Source: Wu et al. 2018 (arXiv:1803.02021), section 2, for any loss; there on a quadratic.
    """
    run = make_run(problem, optax.sgd, steps, sampler=sampler)
    for name in sorted({*run.plan.own, "example_weights"} & set(hparams)):
        raise UserError(f"hyperparameters hold {name}: leave it out of a greedy run")
    if not problem.n and not {"H", "noise"} <= set(problem.data.shared):
        raise UserError(
            f"{problem.name} has no examples, and noise that is not known: expected "
            "examples, or oj.quadratic"
        )
    checked = dict(run.entered({**hparams, "learning_rate": 0.0}))
    return _run(run.plan, problem.data, checked, jnp.asarray(max_rate), key)


@functools.partial(jax.jit, static_argnums=0)
def _run(plan: Plan, data: Data, hparams: HParams, max_rate: Array, key: Key) -> GreedyRun:
    def one(state: RunState, _: Any) -> tuple[RunState, tuple[Array, Array]]:
        loss, rate = _loss_and_rate(plan, data, hparams, max_rate, state)
        state, _ = core.step(plan, data, {**hparams, "learning_rate": rate}, state)
        return state, (rate, loss)

    start = core.init(plan, data, hparams, key)
    end, (rates, losses) = jax.lax.scan(one, start, None, length=plan.steps)
    last = _objective(plan, data, hparams, end)(end.params)
    return GreedyRun(rates, jnp.append(losses, last), end.params)


def _objective(
    plan: Plan, data: Data, hparams: HParams, state: RunState
) -> Callable[[PyTree], Array]:
    """Return the loss over all training data with the l2 term, as a function of the parameters."""
    numbers = core.hparams_at(plan, hparams, state.params, state.step)

    def objective(params: PyTree) -> Array:
        loss = plan.objective(params, state.model_state, data, numbers)
        return core.penalised(loss, numbers.get("l2"), params)

    return objective


def _dot(x: PyTree, y: PyTree) -> Array:
    dtype = core.hyper_dtype(x)
    products = jax.tree.map(lambda u, v: jnp.vdot(u, v).astype(dtype), x, y)
    return sum(jax.tree.leaves(products), jnp.zeros((), dtype))


def _loss_and_rate(
    plan: Plan, data: Data, hparams: HParams, max_rate: Array, state: RunState
) -> tuple[Array, Array]:
    objective = _objective(plan, data, hparams, state)
    loss, g = jax.value_and_grad(objective)(state.params)

    def curvature(v: PyTree) -> Array:
        """vᵀHv."""
        return _dot(v, jax.jvp(jax.grad(objective), (state.params,), (v,))[1])

    gain, cost = _dot(g, g), curvature(g) + _noise_cost(plan, data, hparams, state, curvature)
    bound = max_rate.astype(cost.dtype)
    # Where the gradient is zero and there is no noise, one rate is as good as another.
    unbounded = jnp.where(gain > 0, bound, 0)
    rate = jnp.where(cost > 0, gain / jnp.where(cost > 0, cost, 1), unbounded)
    return loss, jnp.minimum(rate, bound)


def _noise_cost(
    plan: Plan,
    data: Data,
    hparams: HParams,
    state: RunState,
    curvature: Callable[[PyTree], Array],
) -> Array:
    """tr(HC_b)."""
    numbers = core.hparams_at(plan, hparams, state.params, state.step)
    size = numbers.get("batch_size")
    dtype = core.hyper_dtype(state.params)
    if not plan.n:
        H, deviation = data.shared["H"], data.shared["noise"]
        cost = jnp.sum((H if H.ndim == 1 else jnp.diagonal(H)) * deviation**2)
        return cost if size is None else cost / size
    if size is None:
        return jnp.zeros((), dtype)

    def gradient(example: PyTree) -> PyTree:
        def loss(params: PyTree) -> Array:
            one = jax.tree.map(lambda a: a[None], example)
            batch = Batch(one, None, state.key, data.shared)
            return plan.loss(params, state.model_state, batch, numbers)[0]

        return jax.grad(loss)(state.params)

    together = min(plan.n, _TOGETHER)
    gradients = jax.lax.map(gradient, data.examples, batch_size=together)
    noise = jax.tree.map(lambda g: g - jnp.mean(g, axis=0, keepdims=True), gradients)
    cost = jnp.mean(jax.lax.map(curvature, noise, batch_size=together))
    b = jnp.clip(size, 1, plan.slots).astype(dtype)
    if plan.sampler == "replacement":
        return cost / b
    return cost / b * (plan.n - b) / max(plan.n - 1, 1)
