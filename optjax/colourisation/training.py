"""The score of a trained network whose running averages lag behind its weights."""

from collections.abc import Callable

import jax
from flax.linen import Module

from optjax.convnets.layers import population_statistics
from optjax.run.problems import Data, Problem


def population_metrics(net: Module, problem: Problem, batch: int) -> Callable:
    """Make a function that computes the problem's metrics with population statistics.

    Args:
      net: the network of the problem, its statistics kept by `BatchNorm`.
      problem: the problem whose training examples give the statistics.
      batch: pictures a batch of the statistics; see `population_statistics`.

    Returns:
      ((params, model_state), data) → metrics.
    """

    def metrics(variables: tuple, data: Data) -> dict[str, jax.Array]:
        params, state = variables
        stats = population_statistics(
            net, {"params": params, **state}, data.examples["inputs"], batch
        )
        return problem.metrics(params, {"batch_stats": stats}, data, {})

    return metrics
