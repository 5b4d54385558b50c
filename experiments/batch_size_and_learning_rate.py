"""Does the best learning rate grow with the batch, and where does curvature stop it?"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import optax
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from optjax.colourisation import networks
from optjax.colourisation.problem import colourisation_problem
from optjax.experiments.batch_problems import drawn_tiles, spread_squares
from optjax.report.claims import Claim, mean_interval, verdict, with_interval
from optjax.report.style import COLOURS, MARKERS, caption, figure
from optjax.run.problems import least_squares
from optjax.run.trajectory import make_run
from optjax.support.console import silent
from optjax.support.errors import UserError
from optjax.sweeps import sweep

PROBLEMS = {"squares": "least squares", "net": "ConvTransposeNet"}


@dataclass(frozen=True)
class Config:
    """How does the learning rate of least loss after a number of SGD steps depend on the batch?

    Command: optjax run batch_size_and_learning_rate. Cost: 40 s on two cores.
    Expect: on least squares the best rate grows nearly in proportion to small batches and stops
    below 2/λ_max; on ConvTransposeNet it grows, too.
    """

    data: str | None = None
    """Pictures for the network: FILE.npz, FOLDER/ or cifar10; without it, embedded photographs."""
    seed: int = 0
    """Seed of the data; runs have the seeds 0, 1, …"""
    rows: int = 256
    """n of least squares."""
    columns: int = 16
    """d of least squares."""
    rates: int = 25
    """Learning rates of least squares, from 1/300 of 2/λ_max to a little above it."""
    batches: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 256)
    """Batch sizes of least squares."""
    seeds: int = 32
    """Runs of least squares for every rate and batch."""
    steps: int = 100
    """SGD steps of least squares."""
    net_rates: int = 8
    """Learning rates of the network, from 0.03 to 3."""
    net_batches: tuple[int, ...] = (2, 8, 32)
    """Batch sizes of the network."""
    net_seeds: int = 4
    """Runs of the network for every rate and batch."""
    net_steps: int = 60
    """SGD steps of the network."""
    pictures: int = 400
    """Tiles the network trains on."""
    filters: int = 8
    """NF of the network."""
    colours: int = 8
    """NC of the network, and of its palette: the last layer's cost grows with its square."""


def run(config: Config, progress: Callable[[str, float], None] = silent) -> xr.Dataset:
    """Two sweeps over learning rate × batch size × seed."""
    squares, cap = _squares(config, lambda text, f: progress(f"least squares: {text}", 0.1 * f))
    net = _net(config, lambda text, f: progress(f"network: {text}", 0.1 + 0.9 * f))
    found = xr.merge([squares, net], join="outer")
    found["curvature_cap"] = cap
    return found


def _squares(config: Config, progress: Callable[[str, float], None]) -> tuple[xr.Dataset, float]:
    n = config.rows
    if max(config.batches) > n:
        raise UserError(f"batches holds {max(config.batches)}: expected 1 to rows = {n}")
    X, t, least, cap = spread_squares(n, config.columns, config.seed)
    problem = least_squares(X.astype(np.float32), t.astype(np.float32))
    rates = np.geomspace(cap / 300, 1.2 * cap, config.rates)
    found = sweep(
        make_run(problem, optax.sgd, config.steps, record_every=config.steps),
        {"learning_rate": rates, "batch_size": list(config.batches)},
        config.seeds,
        progress=progress,
    )
    excess = found.final_loss - least
    return _named("squares", excess, found, cap), cap


def _net(config: Config, progress: Callable[[str, float], None]) -> xr.Dataset:
    tiles = drawn_tiles(
        config.data, config.pictures, config.seed, config.net_batches, size=16,
        colours=config.colours,
    )  # fmt: skip
    net = networks.model("conv-transpose", filters=config.filters, colours=config.colours)
    every = max(1, config.net_steps // 6)
    found = sweep(
        make_run(
            colourisation_problem(net, tiles),
            optax.sgd,
            every * (config.net_steps // every),
            record_every=every,
        ),
        {
            "learning_rate": np.geomspace(0.03, 3, config.net_rates),
            "batch_size": list(config.net_batches),
        },
        config.net_seeds,
        progress=progress,
    )
    # The loss of the last steps in training mode: the running averages of so few steps lag.
    return _named("net", found.loss.isel(step=-1, drop=True), found, None)


def _named(name: str, loss: xr.DataArray, found: xr.Dataset, cap: float | None) -> xr.Dataset:
    """The losses and each seed's best rate, with axes of their own."""
    axes = {axis: f"{name}_{axis}" for axis in ("learning_rate", "batch_size", "seed")}
    rates = found.learning_rate.values
    losses = loss.transpose("batch_size", "seed", "learning_rate").values
    best = np.apply_along_axis(lambda row: _minimum(rates, row), -1, losses)
    kept = xr.Dataset({f"{name}_loss": loss, f"{name}_status": found.status}).rename(axes)
    kept[f"{name}_best"] = ((axes["batch_size"], axes["seed"]), best)
    return kept.drop_vars("step", errors="ignore")


def _minimum(rates: np.ndarray, losses: np.ndarray) -> float:
    """The rate of least loss: the vertex of the parabola through the three lowest neighbours.

    In log rate and log loss; a grid's end where the least loss lies there.
    """
    y = np.log(np.where(np.isfinite(losses) & (losses > 0), losses, np.inf))
    i = int(np.argmin(y))
    x = np.log(rates)
    if i in (0, len(x) - 1) or not np.isfinite(y[i + 1]):
        return float(rates[i])
    curve = np.polyfit(x[i - 1 : i + 2] - x[i], y[i - 1 : i + 2], 2)
    shift = -curve[1] / (2 * curve[0]) if curve[0] > 0 else 0.0
    return float(np.exp(x[i] + np.clip(shift, x[i - 1] - x[i], x[i + 1] - x[i])))


# ------------------------------------------------------------------------------------- figures


def _best(dataset: xr.Dataset, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Batch sizes, the geometric mean of the seeds' best rates, and its 95 % interval (2, B)."""
    logs = np.log(dataset[f"{name}_best"].values)
    ends = np.array([mean_interval(row) or [row[0], row[0]] for row in logs])
    return dataset[f"{name}_batch_size"].values, np.exp(logs.mean(1)), np.exp(ends.T)


def _growth(ax: Axes, dataset: xr.Dataset, name: str, cap: float | None) -> None:
    sizes, mean, ends = _best(dataset, name)
    ax.errorbar(
        sizes, mean, yerr=np.abs(ends - mean), fmt="o-", color=COLOURS[0], capsize=3, ms=4,
        label="best rate, mean of the seeds and 95 %",
    )  # fmt: skip
    ax.plot(sizes, mean[0] * sizes / sizes[0], ":", color="#777777", label="in proportion to b")
    if cap is not None:
        ax.axhline(cap, color=COLOURS[1], ls="--", label="curvature: 2/λ_max")
    rates = dataset[f"{name}_learning_rate"].values
    ax.set(xscale="log", yscale="log", xlabel="batch size b (examples)",
           ylabel="learning rate of least loss", ylim=(rates[0] / 1.5, rates[-1] * 2))  # fmt: skip
    ax.set_xticks(sizes, [str(b) for b in sizes])
    ax.set_xticks([], minor=True)
    ax.set_title(PROBLEMS[name], fontsize=10)
    ax.legend(frameon=False, fontsize=8)


def _curves(ax: Axes, dataset: xr.Dataset, name: str, label: str) -> None:
    rates, loss = dataset[f"{name}_learning_rate"].values, dataset[f"{name}_loss"]
    sizes = dataset[f"{name}_batch_size"].values
    shown = sizes if len(sizes) <= 5 else sizes[:: -(-len(sizes) // 5)]
    least = []
    for i, size in enumerate(shown):
        runs = loss.sel({f"{name}_batch_size": size}).transpose(f"{name}_learning_rate", ...).values
        good = np.isfinite(runs).all(axis=1)
        middle = np.median(runs[good], axis=1)
        least.append(middle.min())
        ax.plot(rates[good], middle, color=COLOURS[i], marker=MARKERS[i], ms=3.5,
                label=f"b = {size}")  # fmt: skip
        low, high = np.quantile(runs[good], (0.25, 0.75), axis=1)
        ax.fill_between(rates[good], low, high, color=COLOURS[i], alpha=0.2, linewidth=0)
    ax.set(xscale="log", yscale="log", xlabel="learning rate", ylabel=label)
    # Where runs all but diverge, the curves go up by tens of decades.
    ax.set_ylim(0.7 * min(least), min(ax.get_ylim()[1], 30 * max(least)))
    ax.set_title(PROBLEMS[name], fontsize=10)
    ax.legend(frameon=False, fontsize=8)


def figures(dataset: xr.Dataset) -> dict[str, Figure]:
    """The best rate against the batch size; the loss against the rate."""
    grown, axes = figure("wide", 1, 2)
    for ax, name in zip(axes, PROBLEMS, strict=True):
        cap = float(dataset.curvature_cap) if name == "squares" else None
        _growth(ax, dataset, name, cap)
    caption(grown, "The learning rate of least loss after a fixed number of SGD steps, against the "
            "batch size. Dashed: the rate above which curvature makes gradient descent "
            "diverge.")  # fmt: skip
    curves, axes = figure("wide", 1, 2)
    _curves(axes[0], dataset, "squares", "loss above the least, after the last step")
    _curves(axes[1], dataset, "net", "loss of the last steps (nats a pixel)")
    caption(curves, "The loss after a fixed number of steps against the learning rate, for each "
            "batch size b. Lines: medians over seeds; bands: quartiles. Rates at which a run "
            "diverged are left out; curves that leave the frame are on their way "
            "there.")  # fmt: skip
    return {"growth": grown, "curves": curves}


def _bend(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The slope of y (B, seeds) over the lower half of x less that over the upper."""
    middle = len(x) // 2
    slopes = [
        np.polyfit(x[part], y[part], 1)[0] for part in (slice(middle + 1), slice(middle, None))
    ]
    return slopes[0] - slopes[1]


def claims(dataset: xr.Dataset) -> list[Claim]:
    """batch-size/optimal-learning-rate."""
    measured, interval, grows, shorts = {}, {}, [], []
    for name, title in PROBLEMS.items():
        sizes, mean, _ = _best(dataset, name)
        logs = np.log(dataset[f"{name}_best"].values)
        whole = mean_interval(logs[-1] - logs[0])
        measured[f"{title}: best rate at b = {', '.join(map(str, sizes))}"] = mean.tolist()
        factor = f"{title}: factor from b = {sizes[0]} to {sizes[-1]}"
        measured[factor] = float(np.exp((logs[-1] - logs[0]).mean()))
        interval[factor] = None if whole is None else np.exp(whole).tolist()
        grows.append(whole is not None and whole[0] > 0)
        shorts.append(f"× {with_interval(measured[factor], interval[factor], 2)} ({name})")
    cap = float(dataset.curvature_cap)
    sizes, mean, _ = _best(dataset, "squares")
    measured["least squares: 2/λ_max"] = cap
    bend = _bend(np.log(sizes), np.log(dataset.squares_best.values))
    name = "least squares: slope of log rate by log batch, small batches less large ones"
    measured[name], interval[name] = float(bend.mean()), mean_interval(bend)
    flattens = interval[name] is not None and interval[name][0] > 0
    capped = mean[-1] < cap and flattens
    runs = dataset.squares_loss.size + dataset.net_loss.size
    return [
        Claim(
            id="batch-size/optimal-learning-rate",
            statement="As the batch grows the gradient's noise falls and the optimal learning "
            "rate grows, until curvature caps it.",
            source="the optimal learning rate grows with the batch size",
            measured=measured,
            tolerance="the 95 % interval of the growth above 1 on both problems; on least squares "
            "the largest batch's rate below 2/λ_max, and the growth slower over the upper half of "
            "the batch sizes than over the lower (95 % interval of the difference above 0)",
            n_runs=int(runs),
            interval=interval,
            verdict=verdict(all(grows) and capped, reasoning=all(grows)),
            evidence="batch_size_and_learning_rate/growth",
            plain_words="The larger the batch, the larger the best learning rate",
            source_short="it grows with the batch size",
            measured_short=", ".join(shorts),
        )
    ]
