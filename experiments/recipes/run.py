"""What makes a network better at the source's task, at the source's budget?"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import xarray as xr
from flax.linen import Module
from jax.flatten_util import ravel_pytree

from optjax.colourisation.colouriser import rebalanced
from optjax.colourisation.pictures import Pictures, demo_pictures, load_pictures
from optjax.colourisation.problem import colourisation_problem
from optjax.colourisation.task import Task, make_task
from optjax.colourisation.training import mirrored, settle, unravel
from optjax.convnets.layers import BatchNorm
from optjax.experiments.pooling import PHOTOGRAPHS, missed_by_a_probe
from optjax.experiments.recipes.claims import claims as claims
from optjax.experiments.recipes.figures import figures as figures
from optjax.experiments.recipes.metrics import (
    calibration,
    coloured,
    colourfulness,
    confusion,
    label_scores,
    psnr,
    ssim,
)
from optjax.experiments.recipes.studies import OPTIMISERS, STUDIES, Recipe
from optjax.run.problems import Data, Problem
from optjax.run.trajectory import make_run
from optjax.support.console import silent
from optjax.support.errors import UserError, nearest, whole
from optjax.support.types import PyTree
from optjax.sweeps import sweep

SOURCES = {"steps": 1250, "batch_size": 100, "shrink": 1, "colours": 24}
DEMO = {"steps": 250, "batch_size": 32, "shrink": 2, "colours": 12}
TEMPERATURES = (0.05, 0.2, 0.38, 0.6, 1.0)
RECORDS = 10
"""Records along a run, at most, and one in 40 steps: each is as dear as three steps."""
SHOWN = 8
PICTURES = {
    "found": ("picture", "y", "x", "channel"),
    "right": ("picture", "y", "x"),
    "entropy": ("picture", "y", "x"),
}
"""What is kept of the pictures shown, of the first seed, and its axes."""
PROBED = 300
"""Pictures for either part of the probe, at most."""


@dataclass(frozen=True)
class Config:
    """Which recipes colour pictures best, and which of their parts does it?

    A recipe is a network and the way it is trained. Scores are of population statistics.

    Command: optjax run recipes --study comparison --data cifar10 (or FILE.npz, FOLDER/).
    Studies: ours (the default), comparison, ablation, rebalancing, skips, kernels, batches, widths.
    Cost: 40 s on two cores for the demo; 5 min a seed and recipe for the horses.
    Expect: with a table of each pixel's own grey level a small residual network beats the majority
    colour of that level; no network of the source does.
    """

    data: str | None = None
    """FILE.npz, FOLDER/ or cifar10; without it, tiles of scikit-image's photographs."""
    palette: str | None = None
    """FILE.npy with the palette's colours; without it, k-means of the training pictures."""
    study: str = "ours"
    """Which recipes: a name of STUDIES."""
    class_name: str = "horse"
    """The class of cifar10."""
    seeds: int = 5
    """Runs a recipe."""
    steps: int | None = None
    """Steps; by default 1250, the source's, and 250 of the demo."""
    batch_size: int | None = None
    """Pictures a step where the study says 100; by default 100, and 32 of the demo."""
    shrink: int | None = None
    """Divides the filters of every recipe; by default 1, and 2 of the demo."""
    colours: int | None = None
    """NC, colours of the palette; by default 24, and 12 of the demo."""
    size: int = 16
    """Side in pixels of the demo's tiles and of a folder's pictures."""
    seed: int = 0
    """First seed of the runs, and that of the palette."""


FULL = {"study": "comparison"}


def run(config: Config, progress: Callable[[str, float], None] = silent) -> xr.Dataset:
    """Train every recipe from every seed, and score it on pictures held out."""
    demo = config.data is None
    defaults = DEMO if demo else SOURCES
    chosen = asdict(config)
    chosen |= {name: value for name, value in defaults.items() if chosen[name] is None}
    least = {"colours": 6, "size": 8, "seed": 0}
    for name in ("seeds", "seed", "size", *defaults):
        whole(name, chosen[name], least.get(name, 1))
    steps, batch, shrink, colours = (chosen[name] for name in defaults)
    if config.study not in STUDIES:
        raise UserError(f"unknown study {config.study!r}: {nearest(config.study, STUDIES)}")
    recipes = {
        name: replace(recipe, batch_size=max(1, recipe.batch_size * batch // 100))
        for name, recipe in STUDIES[config.study].items()
    }
    task = make_task(_pictures(config), colours, config.palette, seed=config.seed)
    most, count = max(r.batch_size for r in recipes.values()), len(task.train[0])
    if most > count:
        raise UserError(f"{count} training pictures: study {config.study!r} needs {most} or more")
    seeds = range(config.seed, config.seed + config.seeds)
    found = []
    for i, (name, recipe) in enumerate(recipes.items()):
        net = recipe.network(colours, shrink)
        runs = _trained(
            recipe, net, task, max(1, round(recipe.share * steps)), seeds,
            lambda text, f, i=i, name=name: progress(f"{name}: {text}", (i + f) / len(recipes)),
        )  # fmt: skip
        found.append(_judged(net, runs, task, probe=config.study == "skips"))
    data = task.pictures
    shown = _spread(data.validation, SHOWN)
    dataset = xr.concat(found, "recipe", coords="minimal", compat="override")
    return dataset.assign(
        baseline_accuracy=task.baseline.accuracy,
        baseline_loss=task.baseline.loss,
        true_colourfulness=colourfulness(data.validation),
        palette=(("colour", "channel"), task.palette),
        share=(("colour",), np.bincount(task.validation[1].ravel(), minlength=colours)
               / task.validation[1].size),
        true=(("picture", "y", "x", "channel"), shown),
    ).assign_coords(recipe=list(recipes), seed=list(seeds)).assign_attrs(
        demo=int(demo), data=data.name, note=data.note, study=config.study, steps=steps,
    )  # fmt: skip


def _pictures(config: Config) -> Pictures:
    if config.data is None:
        return demo_pictures(PHOTOGRAPHS, config.size, seed=config.seed)
    return load_pictures(
        config.data, class_name=config.class_name, size=config.size, seed=config.seed
    )


def _trained(
    recipe: Recipe,
    net: Module,
    task: Task,
    steps: int,
    seeds: range,
    progress: Callable[[str, float], None],
) -> xr.Dataset:
    """Train a recipe from every seed; the runs keep their variables of population statistics."""
    train = mirrored(task.train) if recipe.mirrored else task.train
    weights = rebalanced(task.train[1], len(task.palette)) if recipe.rebalance else None
    least = -(-steps // max(1, min(RECORDS, steps // 40)))
    every = next((n for n in range(least, 2 * least) if steps % n == 0), least)
    steps = every * round(steps / every)
    problem = colourisation_problem(net, train, task.validation, weights=weights)
    if recipe.counted:
        problem = _begun_at_the_counts(problem, task)
    learn = make_run(
        problem,
        OPTIMISERS[recipe.optimiser],
        steps,
        sampler="epochs",
        max_batch_size=recipe.batch_size,
        record_every=every,
    )
    rate: Any = recipe.learning_rate
    if recipe.cosine:
        rate = optax.cosine_decay_schedule(recipe.learning_rate, steps)

    def final(params: PyTree, state: PyTree, data: Data) -> dict[str, jax.Array]:
        settled = settle(net, params, state, data, recipe.batch_size)
        return {"weights": ravel_pytree(settled)[0]}

    runs = sweep(
        learn, {"learning_rate": [rate]}, seeds, keep_diverged=True, final=final, progress=progress
    )
    return runs.isel(learning_rate=0, drop=True)


def _begun_at_the_counts(problem: Problem, task: Task) -> Problem:
    """Begin the table of a residual network at the log-frequencies of each grey level."""
    log_p = np.log(task.grey_levels.probabilities).astype(np.float32)

    def init(key: jax.Array, data: Data) -> tuple[PyTree, PyTree]:
        params, state = problem.init(key, data)
        return {**params, "table": jnp.asarray(log_p)}, state

    return replace(problem, init=init)


def _judged(net: Module, runs: xr.Dataset, task: Task, probe: bool) -> xr.Dataset:
    """Score the runs of a recipe on the validation pictures; probe its last features if asked."""
    apply: Any = jax.jit(lambda variables, x: jax.nn.softmax(net.apply(variables, x, train=False)))
    (grey, labels), true = task.validation, task.pictures.validation
    colours, missed = len(task.palette), _probe(net)
    probed = [_spread(part[0], PROBED) for part in (task.train, task.validation)]
    rows: list[dict[str, Any]] = []
    weights = runs["weights"].values
    sound = np.isfinite(weights).all(-1)
    if not sound.any():
        raise UserError("every run of a recipe diverged: take pictures that differ more")
    for each in weights[sound]:
        variables = unravel(net, each)
        parts = (grey[at : at + 100] for at in range(0, len(grey), 100))
        p = np.concatenate([np.asarray(apply(variables, part)) for part in parts])
        best = p.argmax(-1)
        found = [coloured(p, task.palette, grey, t) for t in TEMPERATURES]
        at = TEMPERATURES.index(0.38)
        shown = _spread(p, SHOWN)
        rows.append(
            {
                **label_scores(p, labels),
                "ssim": ssim(true, found[at]),
                "psnr": [psnr(true, each) for each in found],
                "colourfulness": [colourfulness(each) for each in found],
                "confusion": confusion(labels, best, colours),
                "reliability": np.array(calibration(p.max(-1).ravel(), (best == labels).ravel())),
                "found": _spread(found[at], SHOWN),
                "right": _spread(best == labels, SHOWN),
                "entropy": -(shown * np.log(np.maximum(shown, 1e-30))).sum(-1),
                **({"missed": missed(variables, *probed)} if probe else {}),
            }
        )
    dims = PICTURES | {
        "psnr": ("temperature",),
        "colourfulness": ("temperature",),
        "confusion": ("colour", "given"),
        "reliability": ("kind", "range"),
    }
    table = {}
    for name in rows[0]:
        values = np.stack([row[name] for row in rows])
        if name in PICTURES:  # of one seed
            table[name] = (dims[name], values[0])
            continue
        filled = np.full((len(sound), *values.shape[1:]), np.nan)  # where a run diverged
        filled[sound] = values
        table[name] = (("seed", *dims.get(name, ())), filled)
    sizes = jax.tree.leaves(variables["params"])
    # Runs of other lengths have their records at other steps: by record, then.
    records = np.linspace(0, runs.sizes["step"] - 1, RECORDS).round().astype(int)
    plain = runs.get("validation_cross_entropy", runs["validation_loss"])
    curve = plain.transpose("seed", "step").values[:, records]
    return xr.Dataset(
        {
            **table,
            "curve": (("seed", "record"), curve),
            "curve_step": ("record", runs["step"].values[records]),
            "parameters": sum(leaf.size for leaf in sizes),
            "seconds_a_run": runs.attrs["seconds"] / len(sound),
        },
        {"temperature": list(TEMPERATURES), "kind": ["confidence", "accuracy", "share"]},
    )


def _probe(net: Module) -> Any:
    """Make the program of what a probe misses of the grey picture in the last features.

    These are the features of the source's networks at full size before the input joins them.
    """

    @jax.jit
    def missed(variables: PyTree, fitted: jax.Array, judged: jax.Array) -> jax.Array:
        seen: Any = net.apply(
            variables, jnp.concatenate([fitted, judged]), train=False,
            capture_intermediates=lambda layer, _: isinstance(layer, BatchNorm),
        )[1]  # fmt: skip
        features = jax.nn.relu(seen["intermediates"]["BatchNorm_3"]["__call__"][0])
        cut = len(fitted)
        return missed_by_a_probe(features[:cut], fitted, features[cut:], judged)

    return missed


def _spread(values: np.ndarray, most: int) -> np.ndarray:
    """Take at most so many, evenly spaced."""
    return values[np.linspace(0, len(values) - 1, min(most, len(values))).astype(int)]
