"""The gradient noise scale as a metric that any run or sweep records."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from optjax.batch_size import gradients
from optjax.batch_size.gradients import GradientPoint, batch_gradient, spread
from optjax.batch_size.ratio import quotient
from optjax.run.problems import Data, LossFn, Metrics, Problem
from optjax.support.errors import UserError, whole
from optjax.support.keys import make_key
from optjax.support.types import Array, HParams, PyTree


def with_noise_scale(
    problem: Problem, batch_size: int = 1, groups: int | None = None, chunk: int | None = None
) -> Problem:
    """Add the gradient noise scale to the metrics that a problem records.

    The first mb examples of a fixed order form m groups of b. With the groups' gradients g_k,

    tr Σ = (b/(m − 1)) Σ|g_k − ḡ|² · (n − 1)/n,  |G|² = |ḡ|² − (s²/b)(1/m − b/n)

    where s² is tr Σ with the divisor n − 1. Both are those of batches drawn with replacement from
    these n examples, unbiased over the order. Where all n examples are used |G|² is exact, and with
    b = 1 so is tr Σ. The order is a shuffle of the examples that is the same at every record of
    every run (data that come sorted would not do); it needs no key and changes no draw of the run.
    In a sweep the order's error is common to all seeds: more groups reduce it, averaging over seeds
    does not. Dropout's masks are likewise the same at every record.

    The metrics are ``noise_scale_gradient_square``, ``noise_scale_trace`` and their ratio
    ``noise_scale`` (∞ where |G|² is not above 0). Over seeds or records, average the first two and
    divide: the mean of the ratios is biased.

    Args:
      problem: any with examples.
      batch_size: b; with batch statistics, that of the training, whose noise is then measured.
      groups: m ≥ 2; by default as many as there are. A record costs the gradient of mb examples.
      chunk: gradients held at once, of d numbers each; by default at most 64 MiB of float32.

    Raises:
      UserError: no examples, b · m above n, fewer than two groups, b = 1 with batch statistics.

    >>> import numpy as np, optax, optjax as oj
    >>> problem = with_noise_scale(oj.least_squares(np.eye(4), [1.0, 2.0, 3.0, 4.0]))
    >>> run = oj.make_run(problem, optax.sgd, steps=2)
    >>> run({"learning_rate": 0.0}, jax.random.key(0)).metrics["noise_scale"].tolist()
    [3.0, 3.0]
    """
    if not isinstance(problem, Problem):
        raise UserError(f"problem is {problem!r}: expected a Problem, as from oj.least_squares")
    n, b = problem.n, whole("batch_size", batch_size, 1)
    if not n:
        raise UserError(
            f"{problem.name} has no examples: a metric has no key to draw its noise with; use "
            "two_batch_noise_scale"
        )
    m = n // b if groups is None else whole("groups", groups, 2)
    if m < 2 or b * m > n:
        raise UserError(
            f"{max(m, 2)} groups of batch_size {b} are {max(m, 2) * b} examples: expected at most "
            f"n = {n}"
        )
    state = jax.eval_shape(problem.init, make_key(0), problem.data)[1]
    gradients.refuse_coupled(state, b)
    chunk = None if chunk is None else whole("chunk", chunk, 1)
    metrics = _WithNoiseScale(problem.metrics, problem.loss, b, m, chunk)
    return dataclasses.replace(problem, metrics=metrics)


@dataclasses.dataclass(frozen=True)
class _WithNoiseScale:
    """Metrics that compare by value, so that equal problems share a program."""

    others: Callable[[PyTree, PyTree, Data, HParams], Metrics]
    loss: LossFn
    batch_size: int
    groups: int
    chunk: int | None

    def __call__(
        self, params: PyTree, model_state: PyTree, data: Data, hparams: HParams
    ) -> Metrics:
        b, m = self.batch_size, self.groups
        n = jax.tree.leaves(data.examples)[0].shape[0]
        at = GradientPoint(params, model_state, data, hparams)
        fixed: Any = make_key(0)
        order = jnp.arange(n, dtype=jnp.int32)
        if b * m < n or b > 1:
            order = jax.random.permutation(fixed, order)
        groups = order[: b * m].reshape(m, b)

        def gradient(k: Array) -> Array:
            return batch_gradient(self.loss, at, groups[k], b, jax.random.fold_in(fixed, k))

        most = gradients.at_once(self.chunk, params, b, m)
        mean, square = spread(gradient, m, most)
        covariance = b * square / (m - 1)
        # Of n examples drawn without replacement, mb leave 1/mb − 1/n of the variance.
        G2 = mean @ mean - covariance * (1 / (b * m) - 1 / n)
        trace = covariance * (1 - 1 / n)
        return {
            **self.others(params, model_state, data, hparams),
            "noise_scale_gradient_square": G2,
            "noise_scale_trace": trace,
            "noise_scale": quotient(trace, G2),
        }
