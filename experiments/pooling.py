"""Does max-pooling discard information, and is that why the source's second network is better?"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import xarray as xr
from flax.linen import Module
from jax.typing import ArrayLike
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from optjax.colourisation.networks import EncoderDecoder
from optjax.colourisation.pictures import demo_pictures, load_pictures
from optjax.colourisation.task import Task, make_task
from optjax.convnets.layers import BatchNorm, population_statistics
from optjax.report.claims import Claim, mean_interval, verdict, with_interval
from optjax.report.style import COLOURS, MARKERS, caption, figure
from optjax.run.problems import Data, Problem
from optjax.run.trajectory import make_run
from optjax.support.console import silent
from optjax.support.errors import UserError, whole
from optjax.support.types import Array, PyTree
from optjax.sweeps import sweep
from optjax.sweeps.checks import Final

PHOTOGRAPHS = ("astronaut", "chelsea", "coffee")
DOWN = ("max-pool", "stride")
UP = ("nearest", "transpose")
RIDGE = 1e-4
"""Of the probe, relative to the mean square of a feature."""
MOST = {"statistics": 640, "probe": 400}
"""Pictures, spread over those that there are, for population statistics and for either part of the
probe, at most."""

FULL = {"batch_size": 16, "colours": 12, "steps": 300}


@dataclass(frozen=True)
class Config:
    """Which half of ConvTransposeNet makes it better, and what does pooling lose?

    Four networks of equal parameters, {max-pool, strided convolution} x {nearest upsampling,
    transposed convolution}, many seeds each; and a linear probe that looks for the grey picture in
    the features of each stage.

    Command: optjax run pooling. Cost: 80 s on two cores.
    Expect: behind max-pooling the probe misses about twice as much, and the loss is larger.
    """

    data: str | None = None
    """FILE.npz, FOLDER/ or cifar10; without it, tiles of scikit-image's photographs."""
    palette: str | None = None
    """FILE.npy with the palette's colours; without it, k-means of the training pictures."""
    class_name: str = "horse"
    """The class of cifar10."""
    seeds: int = 20
    """Runs a network."""
    steps: int = 100
    """Steps of Adam."""
    batch_size: int = 8
    """Pictures a step."""
    learning_rate: float = 3e-3
    """Adam's rate."""
    filters: int = 8
    """NF, channels of the first stage."""
    colours: int = 10
    """NC, colours of the palette."""
    size: int = 16
    """Side in pixels of the demo's tiles and of a folder's pictures."""
    seed: int = 0
    """First seed of the runs, and that of the palette."""


def run(config: Config, progress: Callable[[str, float], None] = silent) -> xr.Dataset:
    """Train every network from every seed; score it, and probe its features."""
    for name, least in (
        ("seeds", 2), ("steps", 1), ("batch_size", 1), ("colours", 2), ("seed", 0), ("size", 12),
    ):  # fmt: skip
        whole(name, getattr(config, name), least)
    if not config.learning_rate > 0:
        raise UserError(f"learning_rate is {config.learning_rate}: expected a number above 0")
    if config.data is None:
        data = demo_pictures(PHOTOGRAPHS, config.size, seed=config.seed)
    else:
        data = load_pictures(
            config.data, class_name=config.class_name, size=config.size, seed=config.seed
        )
    if min(data.size) < 12:
        raise UserError(f"pictures of {data.size} pixels: expected 12 or more, for the probe")
    task = make_task(data, config.colours, config.palette, seed=config.seed)
    seeds = range(config.seed, config.seed + config.seeds)
    cells = [(down, up) for down in DOWN for up in UP]
    found = []
    for i, (down, up) in enumerate(cells):
        net = EncoderDecoder(config.filters, config.colours, down=down, up=up)
        problem = task.problem(net)
        learn = make_run(
            problem, optax.adam, config.steps,
            sampler="epochs", max_batch_size=config.batch_size, record_every=config.steps,
        )  # fmt: skip
        runs = sweep(
            learn,
            {"learning_rate": config.learning_rate},
            seeds,
            keep_diverged=True,
            final=_scores(net, problem, config.batch_size, task),
            progress=lambda text, f, i=i: progress(f"{' + '.join(cells[i])}: {text}", (i + f) / 4),
        )
        found.append(runs.isel(step=-1, drop=True))
    names = [name for name in found[0].data_vars if str(name).startswith(("loss ", "accuracy "))]
    shape = (len(DOWN), len(UP), config.seeds)

    def table(name: Any, own: tuple[int, ...] = ()) -> np.ndarray:
        return np.stack([runs[name].values for runs in found]).reshape(*shape, *own)

    axes = ("down", "up", "seed")
    return xr.Dataset(
        {
            **{str(name).replace(" ", "_"): (axes, table(name)) for name in names},
            "missed": ((*axes, "stage"), table("missed", (2,))),
            "diverged": (axes, table("diverged_at") >= 0),
            "baseline_accuracy": task.baseline.accuracy,
            "baseline_loss": task.baseline.loss,
        },
        {"down": list(DOWN), "up": list(UP), "seed": list(seeds), "stage": [1, 2]},
        {
            "demo": int(data.demo),
            "data": data.name,
            "note": data.note,
            "parameters": sum(leaf.size for leaf in jax.tree.leaves(_params(task, net))),
            "steps": config.steps,
        },
    )


def _params(task: Task, net: Module) -> PyTree:
    return jax.eval_shape(net.init, jax.random.key(0), task.train[0][:1])["params"]


def _scores(net: Module, problem: Problem, batch: int, task: Task) -> Final:
    """What is kept of a run: scores by both statistics, and what the probe misses of a stage."""
    fitted, judged = (_spread(part[0], MOST["probe"]) for part in (task.train, task.validation))

    def final(params: PyTree, state: PyTree, data: Data) -> dict[str, Array]:
        variables = {"params": params, **state}
        inputs = _spread(data.examples["inputs"], max(batch, MOST["statistics"]))
        stats = population_statistics(net, variables, inputs, batch)
        # One program for both kinds of statistics.
        both = jax.tree.map(lambda *leaves: jnp.stack(leaves), state, {"batch_stats": stats})
        scores = jax.lax.map(lambda used: problem.metrics(params, used, data, {}), both)
        kept = {
            f"{name} {kind}": scores[f"validation_{name}"][i]
            for name in ("loss", "accuracy")
            for i, kind in enumerate(("running", "population"))
        }
        seen = jnp.concatenate([fitted, judged])
        stages = _stages(net, {"params": params, "batch_stats": stats}, seen)
        cut = len(fitted)
        missed = [missed_by_a_probe(f[:cut], fitted, f[cut:], judged) for f in stages]
        return {**kept, "missed": jnp.stack(missed)}

    return final


def _spread(inputs: ArrayLike, most: int) -> Array:
    """Take at most so many inputs, evenly spaced."""
    inputs = jnp.asarray(inputs)
    return inputs[:: -(-len(inputs) // most)]


def _stages(net: Module, variables: PyTree, grey: Array) -> list[Array]:
    """Return the features behind the two down-samplings, (n, H/2, W/2, NF), (n, H/4, W/4, 2 NF)."""
    _, seen = net.apply(
        variables, grey, train=False,
        capture_intermediates=lambda layer, _: isinstance(layer, BatchNorm),
    )  # fmt: skip
    outputs = seen["intermediates"]
    return [jax.nn.relu(outputs[f"BatchNorm_{i}"]["__call__"][0]) for i in (0, 1)]


def missed_by_a_probe(features: Array, grey: Array, features_2: Array, grey_2: Array) -> Array:
    """Compute the share of a picture's variance that a linear probe does not find in features.

    The probe predicts the s × s pixels of a place from the features of that place and its eight
    neighbours, by ridge regression: Σ(y − ŷ)² / Σ(y − ȳ)² over pictures that it was not fitted to.

    Args:
      features: (n, h, w, C) to fit it. grey: (n, s·h, s·w, 1), the same pictures.
      features_2, grey_2: to judge it.

    >>> import jax, jax.numpy as jnp
    >>> x = jax.random.normal(jax.random.key(0), (20, 8, 8, 1))
    >>> halves = x.reshape(20, 4, 2, 4, 2).transpose(0, 1, 3, 2, 4).reshape(20, 4, 4, 4)
    >>> bool(missed_by_a_probe(halves, x, halves, x) < 1e-4)  # all is there
    True
    """
    inputs, targets = _places(features, grey)
    mean, centre = inputs.mean(0), targets.mean(0)
    inputs, targets = inputs - mean[None], targets - centre[None]
    gram = inputs.T @ inputs
    ridge = RIDGE * jnp.trace(gram) / len(gram)
    weights = jnp.linalg.solve(
        gram + ridge * jnp.eye(len(gram), dtype=gram.dtype), inputs.T @ targets
    )
    inputs, targets = _places(features_2, grey_2)
    left = targets - centre[None] - (inputs - mean[None]) @ weights
    return jnp.sum(left**2) / jnp.sum((targets - targets.mean(0)[None]) ** 2)


def _places(features: Array, grey: Array) -> tuple[Array, Array]:
    """Return what surrounds each inner place, (m, 9 C), and its pixels, (m, s²)."""
    n, h, w, _ = features.shape
    s = grey.shape[1] // h
    around = [features[:, i : h - 2 + i, j : w - 2 + j] for i in range(3) for j in range(3)]
    blocks = grey.reshape(n, h, s, w, s).transpose(0, 1, 3, 2, 4)[:, 1:-1, 1:-1]
    inputs = jnp.concatenate(around, axis=-1)
    return inputs.reshape(-1, inputs.shape[-1]), blocks.reshape(-1, s * s)


# ------------------------------------------------------------------------------------- figures


def effects(values: np.ndarray) -> dict[str, np.ndarray]:
    """Compute the contrasts of a 2 × 2, of every seed.

    Args:
      values: (down, up, seed).

    Returns:
      by name, (seed,): what max-pooling adds to the value, over both ways up; what nearest
      upsampling adds, over both ways down; and the difference of what pooling adds between them.

    >>> table = np.array([[[5.0], [3.0]], [[2.0], [1.0]]])
    >>> [float(v[0]) for v in effects(table).values()]
    [2.5, 1.5, 1.0]
    """
    pooling, nearest = values[0] - values[1], values[:, 0] - values[:, 1]
    return {
        "max-pooling": pooling.mean(0),
        "nearest upsampling": nearest.mean(0),
        "interaction": pooling[0] - pooling[1],
    }


def figures(dataset: xr.Dataset) -> dict[str, Figure]:
    return {"two-by-two": _two_by_two(dataset), "probe": _probe(dataset)}


def _two_by_two(dataset: xr.Dataset) -> Figure:
    fig, (left, right) = figure("wide", 1, 2)
    loss = dataset["loss_population"]
    for i, up in enumerate(UP):
        _with_intervals(left, loss.sel(up=up).values, 0.05 * (2 * i - 1), i, f"{up}, up")
    left.set(ylabel="validation loss (nats a pixel)", xlabel="down")
    left.set_xticks([0, 1], DOWN)
    left.legend(fontsize=8)
    found = effects(loss.values)
    _with_intervals(right, np.stack(list(found.values())), 0.0, 2)
    right.axhline(0, color="#555555", lw=0.8)
    right.set_xticks(range(3), ["max-pooling\nfor stride", "nearest for\ntranspose", "interaction"])
    right.set(ylabel="loss added (nats a pixel)", xlabel="effect")
    return caption(
        fig,
        f"Four networks of {dataset.attrs['parameters']:,} parameters on {_data(dataset)}, "
        f"{dataset.sizes['seed']} seeds each: mean and 95 % interval of the loss, and of what each "
        "change adds to it. Population statistics. The majority colour of each grey level has "
        f"{float(dataset['baseline_loss']):.3f}.",
    )


def _probe(dataset: xr.Dataset) -> Figure:
    fig, axes = figure("wide", 1, 2, sharey=True)
    for stage, ax in zip((1, 2), axes, strict=True):
        missed = 100 * dataset["missed"].sel(stage=stage)
        for i, up in enumerate(UP):
            _with_intervals(ax, missed.sel(up=up).values, 0.05 * (2 * i - 1), i, f"{up}, up")
        ax.set_xticks([0, 1], DOWN)
        ax.set(xlabel=f"down, stage {stage}")
    axes[0].set_ylabel("share of the grey picture not found (%)")
    axes[0].set_ylim(bottom=0)
    axes[0].legend(fontsize=8)
    return caption(
        fig,
        "Of the variance of the grey picture, what a linear probe does not find in the features "
        "behind each down-sampling: mean and 95 % interval over seeds, on pictures held out.",
    )


def _with_intervals(
    ax: Axes, values: np.ndarray, shift: float, colour: int, label: str | None = None
) -> None:
    """Draw the mean and its interval of each row, (rows, seeds)."""
    at = np.arange(len(values)) + shift
    means = values.mean(-1)
    halves = means - np.array([(mean_interval(row) or [np.nan])[0] for row in values])
    ax.errorbar(
        at, means, halves, fmt=MARKERS[colour], color=COLOURS[colour], capsize=4, label=label
    )
    ax.set_xlim(-0.5, len(values) - 0.5)


def _data(dataset: xr.Dataset) -> str:
    return "demo pictures" if dataset.attrs["demo"] else str(dataset.attrs["data"])


# -------------------------------------------------------------------------------------- claims


def claims(dataset: xr.Dataset) -> list[Claim]:
    loss = effects(dataset["loss_population"].values)
    ends = {name: mean_interval(values) for name, values in loss.items()}
    lost = {
        f"stage {stage}": effects(dataset["missed"].sel(stage=stage).values)["max-pooling"]
        for stage in (1, 2)
    }
    more = {name: mean_interval(values) for name, values in lost.items()}
    discards = all(_above(interval) for interval in more.values())
    harms = _above(ends["max-pooling"])
    finite = bool(
        np.isfinite(dataset["loss_population"]).all() & np.isfinite(dataset["missed"]).all()
    )
    cells = {f"{down} + {up}": dataset.sel(down=down, up=up) for down in DOWN for up in UP}
    shown = ends["max-pooling"]
    corner = dataset["loss_population"].values[0, 0] - dataset["loss_population"].values[1, 1]
    return [
        Claim(
            id="colourisation/why-pooling-discards",
            statement="Max-pooling discards information, and that costs loss. "
            f"Found on {_data(dataset)}, after {dataset.attrs['steps']} steps.",
            source="max-pooling discards information",
            measured={
                **{f"loss added by {name} (nats)": float(v.mean()) for name, v in loss.items()},
                **{
                    f"variance of the picture that pooling hides from a probe, {name} (%)": 100
                    * float(v.mean())
                    for name, v in lost.items()
                },
                **{
                    f"loss of {n} (nats)": float(c["loss_population"].mean())
                    for n, c in cells.items()
                },
                **{
                    f"accuracy of {n} (%)": 100 * float(c["accuracy_population"].mean())
                    for n, c in cells.items()
                },
                **{
                    f"loss of {n} with running averages (nats)": float(c["loss_running"].mean())
                    for n, c in cells.items()
                },
                "loss that max-pool + nearest adds to stride + transpose (nats)": float(
                    corner.mean()
                ),
                "grey-level baseline loss (nats)": float(dataset["baseline_loss"]),
                "runs that diverged": int(dataset["diverged"].sum()),
                "data": dataset.attrs["note"],
            },
            tolerance="holds: behind pooling a linear probe finds less of the picture at both "
            "stages, and pooling adds to the loss, both intervals above 0; corrected: the first "
            "alone",
            n_runs=4 * dataset.sizes["seed"],
            interval={
                **{f"loss added by {name} (nats)": end for name, end in ends.items()},
                **{
                    f"hidden from a probe, {name} (%)": [100 * e for e in end or []]
                    for name, end in more.items()
                },
            },
            verdict=verdict(discards and harms, reasoning=discards) if finite else "not run",
            needs="every run finite: a smaller learning_rate, or pictures that differ",
            evidence="pooling/two-by-two",
            plain_words="Max-pooling discards information, and that costs loss",
            source_short="it discards, so the other net is better",
            measured_short=f"a probe {'misses' if discards else 'does not miss'} more; "
            f"{with_interval(float(loss['max-pooling'].mean()), shown, 2)} nats more",
        )
    ]


def _above(interval: list[float] | None) -> bool:
    return interval is not None and interval[0] > 0
