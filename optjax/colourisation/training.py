"""A network trained from several seeds, and scored when it is."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
from flax.linen import Module

from optjax.convnets.layers import population_statistics
from optjax.problems import Data, Problem
from optjax.trajectory import Records, Run, RunState


def in_epochs(run: Run, hparams: dict, keys: jax.Array, chunk: int, together: bool | None = None):
    """The runs of all keys in chunks: at once on an accelerator, one by one on the CPU.

    Args:
      run: of a network. hparams: as it takes them. keys: (seeds,) one a run.
      chunk: steps of a chunk, a divisor of the run's. together: all at once or one by one.

    Yields (index of the keys, states, records), the leading axis over those keys.
    """
    together = jax.default_backend() != "cpu" if together is None else together

    def lift(one: Any) -> Any:
        return jax.tree.map(lambda leaf: leaf[None], one)

    def chunks() -> Iterator[tuple[list[int], RunState, Records]]:
        if together:
            # The step is the same in every lane: left out of the batch, an epoch's end stays a
            # branch that is rarely taken.
            axes: dict[str, Any] = dict.fromkeys(RunState._fields, 0) | {"step": None}
            lanes = RunState(**axes)
            states = jax.vmap(lambda key: run.init(hparams, key), out_axes=lanes)(keys)
            advance = jax.jit(
                jax.vmap(
                    lambda state, data: run.advance(state, hparams, chunk, data),
                    in_axes=(lanes, None),
                    out_axes=(lanes, 0),
                )
            )
            for _ in range(run.plan.steps // chunk):
                states, records = advance(states, run.problem.data)
                yield list(range(len(keys))), states, records
            return
        for index, key in enumerate(keys):
            for state, records in run.chunks(hparams, key, chunk):
                yield [index], lift(state), lift(records)

    return chunks()


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
