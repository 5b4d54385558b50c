"""Which of the source's three networks colours grey pictures best, and how well?"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import xarray as xr
from flax.linen import Module
from matplotlib.figure import Figure

from optjax.colourisation import networks
from optjax.colourisation.pictures import load_pictures
from optjax.colourisation.task import make_task
from optjax.colourisation.training import population_metrics
from optjax.report.claims import (
    Claim,
    mean_interval,
    prediction_interval,
    verdict,
    with_interval,
)
from optjax.report.style import COLOURS, MARKERS, caption, figure, pictures
from optjax.run.problems import Data, Problem
from optjax.run.trajectory import Run, make_run
from optjax.support.console import silent
from optjax.support.errors import UserError
from optjax.support.types import PyTree
from optjax.sweeps import sweep
from optjax.sweeps.checks import Final

SOURCE = {
    "pool-upsample": {"accuracy": (41.1, 41.1), "loss": (1.588, 1.588)},
    "conv-transpose": {"accuracy": (55.4, 55.4), "loss": (1.1468, 1.1468)},
    "unet": {"accuracy": (57.5, 58.9), "loss": (1.05, 1.07)},
}
"""Validation accuracy in per cent and loss in nats a pixel, lowest and highest stated."""

LEAST_SEEDS = 5
"""Runs that say how far one run may lie from another."""

PROTOCOL = {
    "epochs": 25,
    "batch_size": 100,
    "learning_rate": 1e-3,
    "filters": 32,
    "colours": 24,
    "kernel": 3,
    "pictures": None,
}

NEEDS = (
    "CIFAR-10's horses: see 'optjax data'. An hour on two cores: "
    "'optjax data cifar10 --out horses.npz', then "
    "'optjax run colourisation --data horses.npz'"
)

HORSES = {"train": (5000, (128.0, 122.37, 106.31)), "validation": (1000, (128.8, 123.28, 108.51))}
"""How the source's pictures are recognised: how many, and their mean red, green and blue."""


@dataclass(frozen=True)
class Config:
    """How well do PoolUpsampleNet, ConvTransposeNet and UNet colour pictures of a kind?

    Command: optjax run colourisation --data cifar10 (or FILE.npz, FOLDER/; without, a demo).
    Cost: 45 s on two cores for the demo; 8 to 13 min a seed for the source's protocol.
    Expect: on CIFAR-10 horses 41, 54 and 57 per cent of the pixels right, and 62 for the majority
    colour of each grey level. The demo's held-out photograph is unlike those trained on, and 20
    steps teach little: the nets get 2 to 6 per cent, and the baseline 25.
    """

    data: str | None = None
    """FILE.npz, FOLDER/ or cifar10; without it, tiles of scikit-image's photographs."""
    palette: str | None = None
    """FILE.npy with the palette's colours; without it, k-means of the training pictures."""
    class_name: str = "horse"
    """The class of cifar10."""
    nets: tuple[str, ...] = ("pool-upsample", "conv-transpose", "unet")
    """Networks to train."""
    seeds: int | None = None
    """Runs a network; by default 5, three of the demo."""
    epochs: int | None = None
    """Passes over the training pictures; by default 25, two for the demo."""
    pictures: int | None = None
    """Training pictures, drawn from those that there are; by default all, 200 for the demo."""
    batch_size: int | None = None
    """Pictures a step; by default 100, 20 for the demo."""
    learning_rate: float = 1e-3
    """Adam's rate."""
    filters: int | None = None
    """NF, channels of the first stage; by default 32, 16 for the demo."""
    colours: int = 24
    """NC, colours of the palette."""
    kernel: int = 3
    """Taps along one side of every convolution: 3, 4, 5 or 7."""
    size: int = 32
    """Side in pixels of the demo's tiles and of a folder's pictures."""
    seed: int = 0
    """First seed of the runs, and that of the palette and of a folder's split."""


def run(config: Config, progress: Callable[[str, float], None] = silent) -> xr.Dataset:
    """Train every network from every seed; validation after every epoch."""
    for name, least in (
        ("epochs", 1),
        ("batch_size", 1),
        ("seeds", 1),
        ("pictures", 1),
        ("colours", 2),
        ("filters", 1),
    ):
        value = getattr(config, name)
        if value is not None and value < least:
            raise UserError(f"{name} is {value}: expected at least {least}")
    if not config.learning_rate > 0:
        raise UserError(f"learning_rate is {config.learning_rate}: expected a number above 0")
    progress("reading pictures", 0.0)
    given = load_pictures(
        config.data, class_name=config.class_name, size=config.size, seed=config.seed
    )
    config = replace(
        config,
        seeds=config.seeds or (3 if given.demo else LEAST_SEEDS),
        epochs=config.epochs or (2 if given.demo else PROTOCOL["epochs"]),
        filters=config.filters or (16 if given.demo else PROTOCOL["filters"]),
        batch_size=config.batch_size or (20 if given.demo else PROTOCOL["batch_size"]),
    )
    nets = {
        name: networks.model(
            name, filters=config.filters, colours=config.colours, kernel=config.kernel
        )
        for name in config.nets
    }
    most = config.pictures or (200 if given.demo else None)
    if given.demo:
        given = replace(given, validation=given.validation[::2])
    task = make_task(given, config.colours, config.palette, most, config.seed)
    data, palette, baseline = task.pictures, task.palette, task.baseline
    n = len(data.train)
    if config.batch_size > n:
        raise UserError(f"batch_size is {config.batch_size}: expected 1 to {n}, the pictures")
    seeds, epochs = config.seeds or 1, config.epochs
    first = list(range(config.seed, config.seed + seeds))
    per_epoch = -(-n // config.batch_size)
    shown = np.linspace(0, len(data.validation) - 1, min(8, len(data.validation))).astype(int)
    found = []
    for i, (name, net) in enumerate(nets.items()):
        problem = task.problem(net)
        learn = make_run(
            problem,
            optax.adam,
            steps=per_epoch * epochs,
            sampler="epochs",
            max_batch_size=config.batch_size,
            record_every=per_epoch,
        )
        runs = sweep(
            learn,
            {"learning_rate": [config.learning_rate]},
            first,
            keep_diverged=True,
            final=_scores(net, problem, config.batch_size, task.validation[0][shown]),
            progress=lambda text, f, i=i, name=name: progress(
                f"{name}: {text}", (i + f) / len(nets)
            ),
        )
        runs = runs.isel(learning_rate=0, drop=True).rename(step="epoch")
        runs["parameters"] = _size(learn)
        runs["seconds_an_epoch"] = runs.attrs["seconds"] / (seeds * epochs)
        found.append(runs.drop_vars("epoch"))
    together = xr.concat(found, "net", coords="minimal", compat="override")
    dims = ("net", "seed", "epoch")
    curves = ("validation_loss", "validation_accuracy")
    prediction = together["prediction"].isel(seed=0).transpose("net", ...).values
    return xr.Dataset(
        {
            "train_loss": (dims, together["loss"].transpose(*dims).values),
            **{name: (dims, together[name].transpose(*dims).values) for name in curves},
            **{
                name: (dims[:2], together[name].transpose(*dims[:2]).values)
                for name in ("population_loss", "population_accuracy", "diverged_at")
            },
            "seconds_an_epoch": ("net", together["seconds_an_epoch"].values),
            "parameters": ("net", together["parameters"].values),
            "baseline_accuracy": baseline.accuracy,
            "baseline_loss": baseline.loss,
            "palette": (("colour", "channel"), palette),
            "shown": (("picture", "y", "x", "channel"), data.validation[shown]),
            "shown_label": (("picture", "y", "x"), task.validation[1][shown]),
            "shown_prediction": (("net", "picture", "y", "x"), prediction),
            "shown_baseline": (("picture", "y", "x"), baseline.prediction[shown]),
            "mean_colour": (
                ("split", "channel"),
                [data.train.mean(axis=(0, 1, 2)), data.validation.mean(axis=(0, 1, 2))],
            ),
            "pictures": ("split", [n, len(data.validation)]),
        },
        coords={
            "net": list(nets),
            "seed": first,
            "epoch": np.arange(1, epochs + 1),
            "split": ["train", "validation"],
            "channel": ["red", "green", "blue"],
        },
        attrs={
            "demo": int(data.demo),
            "data": data.name,
            "note": data.note,
            "own_palette": int(config.palette is not None),
            "protocol": int(all(getattr(config, k) == v for k, v in PROTOCOL.items())),
        },
    )


def _scores(net: Module, problem: Problem, batch: int, shown: np.ndarray) -> Final:
    """What is kept of a run: scores with population statistics, its colours of some pictures."""
    population = population_metrics(net, problem, batch)

    def final(params: PyTree, state: PyTree, data: Data) -> dict[str, jax.Array]:
        metrics = population((params, state), data)
        scores = net.apply({"params": params, **state}, jnp.asarray(shown), train=False)
        return {
            "population_loss": metrics["validation_loss"],
            "population_accuracy": metrics["validation_accuracy"],
            "prediction": jnp.argmax(cast(jax.Array, scores), axis=-1).astype(jnp.int32),
        }

    return final


def _size(run: Run) -> int:
    """Parameters of a run's network."""
    state = jax.eval_shape(run.init, {"learning_rate": 0.0}, jax.random.key(0))
    return sum(leaf.size for leaf in jax.tree.leaves(state.params))


# ------------------------------------------------------------------------------------- figures


def _data_label(dataset: xr.Dataset) -> str:
    return "demo pictures" if dataset.attrs["demo"] else str(dataset.attrs["data"])


def figures(dataset: xr.Dataset) -> dict[str, Figure]:
    return {"curves": _curves(dataset), "pictures": _pictures(dataset)}


def _curves(dataset: xr.Dataset) -> Figure:
    fig, (left, right) = figure("wide", 1, 2)
    epoch = dataset["epoch"].values
    for i, net in enumerate(dataset["net"].values.tolist()):
        for ax, name, factor in (
            (left, "validation_accuracy", 100),
            (right, "validation_loss", 1),
        ):
            runs = factor * dataset[name].sel(net=net)
            style = {"color": COLOURS[i], "marker": MARKERS[i], "markersize": 3.5, "label": net}
            ax.plot(epoch, runs.mean("seed"), **style)
            ax.fill_between(
                epoch, runs.min("seed"), runs.max("seed"), color=COLOURS[i], alpha=0.2, linewidth=0
            )
    base = {"color": "#555555", "linestyle": "--", "label": "majority colour of the grey level"}
    left.axhline(100 * float(dataset["baseline_accuracy"]), **base)
    right.axhline(float(dataset["baseline_loss"]), **base)
    left.set(xlabel="epoch", ylabel="validation accuracy (% of pixels)")
    right.set(xlabel="epoch", ylabel="validation loss (nats a pixel)")
    low = min(float(dataset["validation_loss"].min()), float(dataset["baseline_loss"]))
    late = dataset["validation_loss"].isel(epoch=slice(min(1, len(epoch) - 1), None))
    high = max(float(late.max()), float(dataset["baseline_loss"]))
    if np.isfinite(low + high) and high > low:
        right.set_ylim(low - 0.05 * (high - low), high + 0.1 * (high - low))
    right.legend(fontsize=8)
    return caption(
        fig,
        f"Validation along training on {_data_label(dataset)}: mean over "
        f"{dataset.sizes['seed']} seeds, the band from lowest to highest. Dashed: each pixel "
        "takes the colour most frequent in training at its own grey level.",
    )


def _pictures(dataset: xr.Dataset) -> Figure:
    palette = dataset["palette"].values
    true = dataset["shown"].values / 255
    rows = [
        ("grey input", np.repeat(true.mean(-1, keepdims=True), 3, axis=-1)),
        ("true colours", true),
        ("true, in palette", palette[dataset["shown_label"].values]),
        ("majority colour", palette[dataset["shown_baseline"].values]),
        *(
            (net, palette[dataset["shown_prediction"].sel(net=net).values])
            for net in dataset["net"].values.tolist()
        ),
    ]
    count = dataset.sizes["picture"]
    fig, axes = figure("wide", len(rows), count, height=1.14 * len(rows))
    for r, (label, row) in enumerate(rows):
        for c in range(count):
            ax = pictures(np.atleast_2d(axes)[r, c])
            ax.imshow(np.clip(row[c], 0, 1), interpolation="nearest")
        np.atleast_2d(axes)[r, 0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=9)
    return caption(
        fig,
        f"Validation pictures of {_data_label(dataset)}, by row: what the nets see, what is "
        "true, the best the palette can do, the baseline, and each net's colours (first seed).",
    )


# -------------------------------------------------------------------------------------- claims


def _is_sources(dataset: xr.Dataset) -> str | None:
    """None where the run is the source's protocol on its pictures, else what was missing."""
    for i, (count, mean) in enumerate(HORSES.values()):
        same = np.allclose(dataset["mean_colour"].values[i], mean, atol=0.1)
        if int(dataset["pictures"][i]) != count or not same:
            return f"trained on {_data_label(dataset)}; the figure is for CIFAR-10's horses"
    if not dataset.attrs["protocol"]:
        return "not the source's protocol"
    return None


def claims(dataset: xr.Dataset) -> list[Claim]:
    nets = dataset["net"].values.tolist()
    last = dataset.isel(epoch=-1)
    accuracy = {net: 100 * last["validation_accuracy"].sel(net=net).values for net in nets}
    loss = {net: last["validation_loss"].sel(net=net).values for net in nets}
    seeds, missing = dataset.sizes["seed"], _is_sources(dataset)
    evidence = "colourisation.nc, figure curves"
    palette = "a palette given" if dataset.attrs["own_palette"] else "a k-means palette"
    found = []
    few = f"{seeds} seeds; expected {LEAST_SEEDS} or more" if seeds < LEAST_SEEDS else None
    if not np.isfinite(dataset["validation_loss"]).all():
        few = "a run that diverged"
    for net in nets:
        source, runs = SOURCE[net], {"accuracy": accuracy[net], "loss": loss[net]}
        ends = {name: mean_interval(values) for name, values in runs.items()}
        single = {name: prediction_interval(values) for name, values in runs.items()}
        near = all(
            interval[0] <= source[name][0] and source[name][1] <= interval[1]
            for name, interval in single.items()
            if interval is not None
        )
        population = {
            f"{name} with population statistics ({unit})": factor
            * dataset[f"population_{name}"].sel(net=net).values
            for name, unit, factor in (("accuracy", "%", 100), ("loss", "nats", 1))
        }
        found.append(
            Claim(
                id=f"colourisation/{net}",
                statement=f"Validation accuracy and loss of {net} after the source's protocol.",
                source={
                    "accuracy (%)": _range(source["accuracy"]),
                    "loss (nats)": _range(source["loss"]),
                },
                measured={
                    "accuracy (%)": float(np.mean(accuracy[net])),
                    "loss (nats)": float(np.mean(loss[net])),
                    **{name: float(values.mean()) for name, values in population.items()},
                    "grey-level baseline accuracy (%)": 100 * float(dataset["baseline_accuracy"]),
                    "data": f"{_data_label(dataset)}, {palette}"
                    + (f" ({missing or few})" if missing or few else ""),
                },
                tolerance="every published figure lies in the 95 % prediction interval of a "
                f"single run, {LEAST_SEEDS} seeds or more: the source's figures are of one run",
                n_runs=seeds,
                interval={
                    "accuracy (%)": ends["accuracy"],
                    "loss (nats)": ends["loss"],
                    "accuracy of a single run (%)": single["accuracy"],
                    "loss of a single run (nats)": single["loss"],
                    **{name: mean_interval(values) for name, values in population.items()},
                },
                # A figure that does not come out is corrected: both stand side by side.
                verdict="not run" if missing or few else verdict(near, reasoning=True),
                evidence=evidence,
                plain_words=f"Accuracy and loss of {net} by the source's protocol",
                source_short=f"{_range(source['accuracy'])} %, {_range(source['loss'])} nats",
                measured_short=f"{with_interval(accuracy[net].mean(), ends['accuracy'], 3, ' %')}, "
                f"{with_interval(loss[net].mean(), ends['loss'], 4)} nats",
                needs=NEEDS,
            )
        )
    if {"pool-upsample", "conv-transpose"} <= set(nets):
        gain = accuracy["conv-transpose"] - accuracy["pool-upsample"]
        interval = mean_interval(gain)
        # Other pictures decide it, too, if they tell apart two nets that have learned something.
        worse = min(accuracy[name].mean() for name in ("pool-upsample", "conv-transpose"))
        apart = interval is not None and (interval[0] > 0 or interval[1] < 0)
        apart &= bool(worse > 100 * float(dataset["baseline_accuracy"]))
        decided = interval is not None and (missing is None or apart)
        where = "" if missing is None else f" Found on {_data_label(dataset)}."
        found.append(
            Claim(
                id="colourisation/transpose-beats-pool",
                statement=f"ConvTransposeNet is better than PoolUpsampleNet.{where}",
                source="conv-transpose is better",
                measured={
                    "gain in accuracy (points)": float(gain.mean()),
                    "gain of each seed": gain.tolist(),
                    "data": f"{_data_label(dataset)}: {dataset.attrs['note']}",
                },
                tolerance="the interval of the gain over seeds lies above 0; on other pictures "
                "than the source's it is not run where the interval holds 0 or a net is worse than "
                "the majority colour of each grey level",
                n_runs=2 * seeds,
                interval=interval,
                verdict=verdict(interval[0] > 0 and bool(np.all(gain > 0)))
                if decided and interval is not None
                else "not run",
                evidence=evidence,
                plain_words="ConvTransposeNet is better than PoolUpsampleNet",
                measured_short=f"{with_interval(gain.mean(), interval)} points of accuracy better",
                needs=NEEDS,
            )
        )
    return found


def _range(pair: tuple[float, float]) -> float | str:
    return pair[0] if pair[0] == pair[1] else f"{pair[0]} to {pair[1]}"
