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
    strips,
    to_lab,
    variables_of,
)
from optjax.colourisation.pictures import Pictures
from optjax.colourisation.problem import colourisation_problem
from optjax.convnets.layers import population_statistics
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
        settled = settle(net, params, state, data, batch)
        params, state = settled["params"], {"batch_stats": settled["batch_stats"]}
        return problem.metrics(params, state, data, {})

    return metrics


def settle(net: Module, params: PyTree, state: PyTree, data: Data, batch: int) -> dict[str, PyTree]:
    """Return the variables of a trained network, "params" and "batch_stats" of the population."""
    variables = {"params": params, **state}
    stats = population_statistics(net, variables, data.examples["inputs"], batch)
    return {"params": params, "batch_stats": stats}


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
    model = networks.model(net, filters=filters, colours=bins)
    pixels = pictures.train.reshape(-1, 3)
    drawn = np.random.default_rng(seed).integers(0, len(pixels), min(len(pixels), 20_000))
    centres = chroma_bins(to_lab(pixels[drawn][None]).chroma[0], bins, seed)
    train, held_out = (_labelled(part, centres) for part in (pictures.train, pictures.validation))
    weights = rebalanced(train[1], bins) if rebalance else None
    problem = colourisation_problem(model, mirrored(train), held_out, weights=weights)
    every = next(n for n in range(max(1, steps // 20), steps + 1) if steps % n == 0)
    run = make_run(
        problem, optax.adam, steps,
        sampler="epochs", max_batch_size=batch_size, record_every=every,
    )  # fmt: skip

    def final(params: PyTree, state: PyTree, data: Data) -> dict[str, Array]:
        settled = settle(model, params, state, data, batch_size)
        metrics = problem.metrics(params, {"batch_stats": settled["batch_stats"]}, data, {})
        final = {f"final_{name}": value for name, value in metrics.items()}
        return {"weights": ravel_pytree(settled)[0], **final}

    rate = optax.cosine_decay_schedule(learning_rate, steps)
    found = sweep(run, {"learning_rate": [rate]}, [seed], final=final, out=out, progress=progress)
    ended = found.isel(learning_rate=0, seed=0)
    if not np.isfinite(ended["weights"]).all():
        raise UserError(f"the training diverged: take a learning_rate below {learning_rate:g}")
    variables = unravel(model, ended["weights"].values)
    scores = {
        "loss": float(ended[f"final_validation_{'cross_entropy' if rebalance else 'loss'}"]),
        "accuracy": float(ended["final_validation_accuracy"]),
    }
    note = f"{pictures.name}: {pictures.note}"
    return Colouriser(net, filters, centres, variables, note), scores


def mirrored(part: tuple[NDArray, NDArray]) -> tuple[NDArray, NDArray]:
    """Add the mirror images of pictures (n, H, W, 1) and of their labels (n, H, W)."""
    grey, labels = (np.concatenate([each, each[:, :, ::-1]]) for each in part)
    return grey, labels


def unravel(net: Module, weights: NDArray) -> PyTree:
    """Return the variables of a network, of NumPy's arrays, from their ravelled numbers."""
    empty = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), variables_of(net))
    return jax.tree.map(np.asarray, ravel_pytree(empty)[1](jnp.asarray(weights)))


def _labelled(
    part: NDArray[np.uint8], centres: NDArray[np.float32]
) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    """Return the light of pictures, in [0, 1], and the bin of every pixel; some at a time."""
    light = np.empty((*part.shape[:3], 1), np.float32)
    labels = np.empty(part.shape[:3], np.int32)
    for some in strips(len(part), part.shape[1] * part.shape[2]):
        lab = to_lab(part[some])
        light[some, ..., 0] = lab.light / 100
        labels[some] = nearest_bin(lab.chroma, centres)
    return light, labels
