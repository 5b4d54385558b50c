"""Training a network that colours photographs, and scoring one by its own statistics."""

import os
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.linen import Module
from jax.flatten_util import ravel_pytree
from numpy.typing import NDArray

from optjax.colourisation import networks
from optjax.colourisation.colouriser import (
    Colouriser,
    chroma_bins,
    nearest_bin,
    rebalanced,
    to_lab,
)
from optjax.colourisation.pictures import Pictures
from optjax.colourisation.problem import pixel_accuracy, pixelwise_cross_entropy
from optjax.convnets.layers import population_statistics
from optjax.run.flax_models import flax_problem
from optjax.run.problems import Data, Problem
from optjax.run.trajectory import make_run
from optjax.support.errors import UserError, whole
from optjax.support.types import Array, PyTree
from optjax.sweeps import sweep


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


def train_colouriser(
    pictures: Pictures,
    *,
    net: str = "unet",
    filters: int = 32,
    bins: int = 64,
    steps: int = 2000,
    batch_size: int = 32,
    learning_rate: float = 3e-3,
    rebalance: bool = False,
    seed: int = 0,
    out: str | os.PathLike[str] | None = None,
    progress: Callable[[str, float], None] | None = None,
) -> tuple[Colouriser, dict[str, float]]:
    """Train a network to give each pixel's bin of chroma from the lightness of the picture.

    Adam with a cosine schedule, on the pictures and their mirror images; the network keeps
    population statistics.

    Args:
      pictures: to train on and to score by.
      net: one of `networks.MODELS`; filters: NF.
      bins: K, chosen by k-means of the chroma of the training pictures.
      steps, batch_size, learning_rate, seed: of the training.
      rebalance: weigh the pixels of rare colours more; see `rebalanced`.
      out: a folder that keeps checkpoints; the same call resumes.
      progress: called with (text, fraction).

    Returns:
      the model, and its validation loss (nats a pixel) and accuracy.

    Raises:
      UserError: a value out of range, fewer pictures than a batch, a training that diverged.
    """
    for name, value, least in (("bins", bins, 2), ("steps", steps, 1), ("seed", seed, 0)):
        whole(name, value, least)
    if whole("batch_size", batch_size, 1) > len(pictures.train):
        raise UserError(
            f"batch_size is {batch_size}: expected 1 to {len(pictures.train)}, the pictures"
        )
    if not learning_rate > 0:
        raise UserError(f"learning_rate is {learning_rate}: expected a number above 0")
    lab = to_lab(pictures.train)
    centres = chroma_bins(lab.chroma.reshape(-1, 2), bins, seed)

    def labelled(part: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
        found = to_lab(part)
        return found.light[..., None] / np.float32(100), nearest_bin(found.chroma, centres)

    train, held_out = (labelled(part) for part in (pictures.train, pictures.validation))
    weights = rebalanced(train[1], bins) if rebalance else None
    grey, labels = (np.concatenate([part, part[:, :, ::-1]]) for part in train)

    def loss(scores: Array, labels: Array) -> Array:
        return pixelwise_cross_entropy(scores, labels, weights)

    model = networks.model(net, filters=filters, colours=bins)
    problem = flax_problem(model, grey, labels, loss, validation=held_out, score=pixel_accuracy)
    every = max(n for n in range(1, max(1, steps // 20) + 1) if steps % n == 0)
    run = make_run(
        problem, optax.adam, steps,
        sampler="epochs", max_batch_size=batch_size, record_every=every,
    )  # fmt: skip

    def final(params: PyTree, state: PyTree, data: Data) -> dict[str, Array]:
        variables = {"params": params, **state}
        stats = population_statistics(model, variables, data.examples["inputs"], batch_size)
        metrics = problem.metrics(params, {"batch_stats": stats}, data, {})
        kept = ravel_pytree({"params": params, "batch_stats": stats})[0]
        return {"weights": kept, **{f"final_{name}": value for name, value in metrics.items()}}

    rate = optax.cosine_decay_schedule(learning_rate, steps)
    found = sweep(run, {"learning_rate": [rate]}, [seed], final=final, out=out, progress=progress)
    ended = found.isel(learning_rate=0, seed=0)
    if not np.isfinite(ended["weights"]).all():
        raise UserError(f"the training diverged: take a learning_rate below {learning_rate:g}")
    shapes = jax.eval_shape(
        lambda: model.init(jax.random.key(0), jnp.zeros((1, 4, 4, 1), jnp.float32))
    )
    empty = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    empty = {"params": empty["params"], "batch_stats": empty["batch_stats"]}
    variables = jax.tree.map(np.asarray, ravel_pytree(empty)[1](jnp.asarray(ended["weights"])))
    scores = {name: float(ended[f"final_validation_{name}"]) for name in ("loss", "accuracy")}
    note = f"{pictures.name}: {pictures.note}"
    return Colouriser(net, filters, centres, variables, note), scores
