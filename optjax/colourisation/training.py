"""How a trained network is scored when its running averages lag behind its weights."""

from collections.abc import Callable

import jax
from flax.linen import Module

from optjax.convnets.layers import population_statistics
from optjax.run.problems import Data, Problem


def population_metrics(net: Module, problem: Problem, batch: int) -> Callable:
    """((params, model_state), data) → the problem's metrics with population statistics.

    Args:
      net: the network of the problem, its statistics kept by `BatchNorm`.
      batch: pictures a batch of the statistics; see `population_statistics`.
    """

    def metrics(variables: tuple, data: Data) -> dict[str, jax.Array]:
        params, state = variables
        stats = population_statistics(
            net, {"params": params, **state}, data.examples["inputs"], batch
        )
        return problem.metrics(params, {"batch_stats": stats}, data, {})

    return metrics
