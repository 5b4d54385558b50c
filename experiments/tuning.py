"""Does descent on hyperparameters find better ones than a grid or a random search of equal cost?"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import optax
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from optjax.colourisation import networks
from optjax.colourisation.palette import grey, kmeans_palette, nearest_colour
from optjax.colourisation.pictures import load_pictures
from optjax.colourisation.problem import colourisation_problem
from optjax.report.claims import Claim, mean_interval, verdict, with_interval
from optjax.report.style import COLOURS, MARKERS, caption, figure
from optjax.run.core import Status
from optjax.run.optimizers import with_weight_decay
from optjax.run.piecewise import Piecewise
from optjax.run.problems import least_squares
from optjax.run.trajectory import Run, make_run
from optjax.support.console import silent
from optjax.sweeps import sweep
from optjax.sweeps.grid import points as listed
from optjax.tuning import tune

CASES = {"squares": "least squares", "net": "ConvTransposeNet"}
METHODS = {
    "start": "start",
    "gradient": "gradient (schedule, momentum, decay)",
    "random": "random search, one rate",
    "random_schedule": "random search, schedule",
}
HELD_OUT = 10_000
"""First of the seeds that judge; those that tune are 0, 1, …"""


@dataclass(frozen=True)
class Config:
    """Are a rate's schedule, momentum and weight decay tuned better by gradient than by search?

    Command: optjax run tuning. Cost: 65 s on two cores.
    Expect: on least squares the tuned schedule beats the best constant rate of a fine grid, and a
    random search of equal cost does not come near it; on the network, in runs of 32 steps, a
    search over one rate does as well.
    """

    data: str | None = None
    """Pictures for the network: FILE.npz, FOLDER/ or cifar10; without it, embedded photographs."""
    seed: int = 0
    """Seed of the data and of the random searches."""
    gradient_cost: int = 5
    """Runs that a gradient counts for: the random searches get so many points an outer step."""
    steps: int = 200
    """SGD steps of least squares, batches of 8."""
    pieces: int = 20
    """Pieces of its rate's schedule."""
    outer_steps: int = 150
    """Outer steps of its tuning."""
    seeds: int = 8
    """Runs of least squares that a point is tuned on."""
    grid: int = 100
    """Constant rates of the fine grid."""
    judges: int = 64
    """Runs of least squares, from other seeds, that judge."""
    net_steps: int = 32
    """SGD steps of the network, batches of 8."""
    net_pieces: int = 4
    """Pieces of its schedule."""
    net_outer_steps: int = 12
    """Outer steps of its tuning."""
    net_seeds: int = 2
    """Runs of the network that a point is tuned on."""
    net_judges: int = 32
    """Runs of the network that judge."""
    filters: int = 8
    """NF of the network."""
    colours: int = 8
    """NC of the network, and of its palette: the last layer's cost grows with its square."""


class _Case(NamedTuple):
    run: Run
    of: str
    start: dict[str, Any]
    seeds: int
    judges: int
    outer_steps: int
    pieces: int
    rate_range: tuple[float, float]
    floor: float  # the least value there can be, subtracted


def run(config: Config, progress: Callable[[str, float], None] = silent) -> xr.Dataset:
    """Both cases; least squares with its grid of constant rates."""
    squares, cap = _squares(config)
    net = _net(config)
    for case in (squares, net):
        case.run.checked(case.start)  # a schedule that does not fit is said before minutes of work
    found = _compared("squares", squares, config, lambda t, f: progress(t, 0.15 * f))
    grid = _grid(squares, cap, config)
    nets = _compared("net", net, config, lambda t, f: progress(t, 0.15 + 0.85 * f))
    return xr.merge([found, grid, nets], join="outer", combine_attrs="no_conflicts")


def _squares(config: Config) -> tuple[_Case, float]:
    rng = np.random.default_rng(config.seed)
    n, d = 256, 32
    X = rng.normal(size=(n, d)) * np.geomspace(1, 0.1, d)
    t = X @ rng.normal(size=d) + rng.normal(size=n)
    cap = float(n / np.linalg.norm(X, 2) ** 2)
    best = np.linalg.lstsq(X, t, rcond=None)[0]
    floor = float(np.mean((X @ best - t) ** 2))
    start = {
        "learning_rate": Piecewise(np.full(config.pieces, cap / 10)),
        "momentum": 0.3,
        "weight_decay": 1e-5,
    }
    problem = least_squares(X.astype(np.float32), t.astype(np.float32))
    made = make_run(
        problem, with_weight_decay(optax.sgd), config.steps, max_batch_size=8,
        record_every=config.steps,
    )  # fmt: skip
    ends = (cap / 1000, cap)
    return (
        _Case(made, "final_loss", start, config.seeds, config.judges, config.outer_steps,
              config.pieces, ends, floor),
        cap,
    )  # fmt: skip


def _net(config: Config) -> _Case:
    data = load_pictures(config.data, size=16, seed=config.seed)
    rng = np.random.default_rng(config.seed)
    tiles = data.train[rng.permutation(len(data.train))[:480]]
    labels = nearest_colour(tiles, kmeans_palette(tiles, config.colours, config.seed))
    held = len(tiles) // 6
    problem = colourisation_problem(
        networks.model("conv-transpose", filters=config.filters, colours=config.colours),
        (grey(tiles[held:]), labels[held:]),
        (grey(tiles[:held]), labels[:held]),
    )
    start = {
        "learning_rate": Piecewise(np.full(config.net_pieces, 0.1)),
        "momentum": 0.5,
        "weight_decay": 1e-4,
    }
    made = make_run(
        problem, with_weight_decay(optax.sgd), config.net_steps, max_batch_size=8,
        record_every=config.net_steps,
    )  # fmt: skip
    return _Case(made, "validation_loss", start, config.net_seeds, config.net_judges,
                 config.net_outer_steps, config.net_pieces, (3e-3, 3.0), 0.0)  # fmt: skip


def _compared(
    name: str, case: _Case, config: Config, progress: Callable[[str, float], None]
) -> xr.Dataset:
    """The start, the gradient and two random searches: what each saw, and what judges say."""
    found = tune(
        case.run, case.of, case.start, steps=case.outer_steps, seeds=case.seeds,
        progress=lambda text, f: progress(f"{CASES[name]}: {text}", 0.5 * f),
    )  # fmt: skip
    points = case.outer_steps * config.gradient_cost
    rng = np.random.default_rng(config.seed + 1)
    best, seen = {"start": case.start, "gradient": found.hparams}, {}
    for i, method in enumerate(("random", "random_schedule")):
        drawn = _drawn(rng, case, points, scheduled=method == "random_schedule")
        tell = lambda _, f, i=i: progress(f"{CASES[name]}: random search", 0.5 + 0.2 * (i + f))  # noqa: E731
        seen[method] = _values(case, drawn, range(case.seeds), tell).mean(axis=1)
        best[method] = drawn[int(np.nanargmin(seen[method]))]
    judges = range(HELD_OUT, HELD_OUT + case.judges)
    tell = lambda _, f: progress(f"{CASES[name]}: judging", 0.9 + 0.1 * f)  # noqa: E731
    judgements = _values(case, [{**case.start, **best[m]} for m in METHODS], judges, tell)
    judged = dict(zip(METHODS, judgements, strict=True))
    rates = np.stack([np.asarray(best[m]["learning_rate"].values) for m in METHODS])
    others = np.array([[float(best[m][k]) for k in ("momentum", "weight_decay")] for m in METHODS])
    step, piece = f"{name}_outer_step", f"{name}_piece"
    return xr.Dataset(
        {
            f"{name}_value": (step, found.path.value.values[0] - case.floor),
            f"{name}_random": (
                ("search", f"{name}_point"),
                np.stack([seen["random"], seen["random_schedule"]]) - case.floor,
            ),
            f"{name}_judged": (
                ("by", f"{name}_judge"),
                np.stack([judged[m] for m in METHODS]) - case.floor,
            ),
            f"{name}_rates": (("by", piece), rates),
            f"{name}_others": (("by", "other"), others),
        },
        {"by": list(METHODS), "search": ["random", "random_schedule"],
         "other": ["momentum", "weight_decay"]},
        {f"{name}_steps": case.run.plan.steps, "gradient_cost": config.gradient_cost},
    )  # fmt: skip


def _values(
    case: _Case, points: list[dict[str, Any]], seeds: range, progress: Callable[[str, float], None]
) -> np.ndarray:
    """Return the numbers that the points make from the seeds, (points, seeds); NaN: diverged."""
    found = sweep(case.run, listed(points), list(seeds), progress=progress)
    values = found[case.of]
    values = values.isel(step=-1) if "step" in values.dims else values
    return values.where(found.status != Status.DIVERGED).transpose("point", "seed").values


def _drawn(
    rng: np.random.Generator, case: _Case, count: int, *, scheduled: bool
) -> list[dict[str, Any]]:
    """Points of a random search: rates and decay log-uniform, momentum uniform."""
    low, high = np.log(case.rate_range)
    rates = np.exp(rng.uniform(low, high, (count, case.pieces if scheduled else 1)))
    momentum = rng.uniform(0, 0.99, count)
    decay = np.exp(rng.uniform(np.log(1e-6), np.log(1e-2), count))
    return [
        {"learning_rate": Piecewise(np.resize(r, case.pieces)), "momentum": m, "weight_decay": d}
        for r, m, d in zip(rates, momentum, decay, strict=True)
    ]


def _grid(case: _Case, cap: float, config: Config) -> xr.Dataset:
    """Constant rates, without and with momentum, judged by the very seeds that judge the others."""
    found = sweep(
        case.run,
        {
            "learning_rate": np.geomspace(cap / 300, cap, config.grid),
            "momentum": [0.0, 0.5, 0.9],
            "weight_decay": [0.0],
        },
        (HELD_OUT + np.arange(config.judges)).tolist(),
        progress=silent,
    )
    kept = (found.final_loss - case.floor).isel(weight_decay=0, drop=True)
    names = {"learning_rate": "grid_rate", "momentum": "grid_momentum", "seed": "grid_seed"}
    return xr.Dataset({"grid_loss": kept.rename(names)}).drop_vars("grid_seed")


# ------------------------------------------------------------------------------------- figures


def _search(ax: Axes, dataset: xr.Dataset, name: str, cost: int) -> None:
    value = np.minimum.accumulate(dataset[f"{name}_value"].values)
    ax.plot(cost * np.arange(1, len(value) + 1), value, color=COLOURS[0],
            label="gradient: schedule, momentum, decay")  # fmt: skip
    for i, (search, label) in enumerate(
        (("random", "random: one rate"), ("random_schedule", "random: schedule"))
    ):
        values = dataset[f"{name}_random"].sel(search=search).values
        least = np.fmin.accumulate(values)
        ax.plot(np.arange(1, len(least) + 1), least, color=COLOURS[i + 1], ls=("--", ":")[i],
                label=label)  # fmt: skip
    ax.set(xscale="log", xlabel=f"cost (points; a gradient counts for {cost})")
    if name == "squares":
        # The first points of a random search may be as good as diverged.
        ax.set(yscale="log", ylabel="best loss above the least", ylim=(None, 5 * value[0]))
    else:
        ax.set_ylabel("best validation loss (nats a pixel)")
    ax.set_title(CASES[name], fontsize=10)
    ax.legend(frameon=False, fontsize=8)


def _schedules(ax: Axes, dataset: xr.Dataset, name: str) -> None:
    steps = int(dataset.attrs[f"{name}_steps"])
    rates = dataset[f"{name}_rates"]
    edges = np.linspace(0, steps, rates.sizes[f"{name}_piece"] + 1)
    shown = {"start": "--", "gradient": "-", "random": ":"}
    for i, (method, style) in enumerate(shown.items()):
        momentum = float(dataset[f"{name}_others"].sel(by=method, other="momentum"))
        ax.stairs(rates.sel(by=method).values, edges, color=COLOURS[(6, 0, 1)[i]], ls=style,
                  lw=1.6, baseline=None,
                  label=f"{method}, momentum {momentum:.2f}")  # fmt: skip
    ax.set(yscale="log", xlabel="step", ylabel="learning rate")
    ax.set_title(CASES[name], fontsize=10)
    ax.legend(frameon=False, fontsize=8)


def _judgements(ax: Axes, dataset: xr.Dataset, name: str) -> None:
    judged = dataset[f"{name}_judged"]
    rows = [(METHODS[m], judged.sel(by=m).values) for m in METHODS]
    if name == "squares":
        rows.append(("best constant rate of the grid", _best_of_grid(dataset)[1]))
    for i, (_, values) in enumerate(rows):
        mean = values.mean()
        low, high = mean_interval(values) or (mean, mean)
        ax.errorbar(mean, len(rows) - i, xerr=[[mean - low], [high - mean]], fmt=MARKERS[i],
                    color=COLOURS[i], capsize=3, ms=5)  # fmt: skip
    ax.set_yticks(range(len(rows), 0, -1), [label for label, _ in rows])
    if name == "squares":
        ax.set_xscale("log")
    ax.set(ylim=(0.5, len(rows) + 0.5), xlabel="loss above the least, other seeds"
           if name == "squares" else "validation loss (nats a pixel), other seeds")  # fmt: skip
    ax.set_title(CASES[name], fontsize=10)


def figures(dataset: xr.Dataset) -> dict[str, Figure]:
    """The searches, the schedules that they found, and what other seeds say of them."""
    cost = int(dataset.attrs["gradient_cost"])
    searched, axes = figure("wide", 1, 2)
    for ax, name in zip(axes, CASES, strict=True):
        _search(ax, dataset, name, cost)
    caption(searched, "What each search had found for what it had cost. The best mean loss so far, "
            "over the seeds that tune.")  # fmt: skip
    found, axes = figure("wide", 1, 2)
    for ax, name in zip(axes, CASES, strict=True):
        _schedules(ax, dataset, name)
    caption(found, "What was tuned: the learning rate along the run, and the momentum beside it.")
    judged, axes = figure("wide", 2, 1, height=4.4)
    for ax, name in zip(axes, CASES, strict=True):
        _judgements(ax, dataset, name)
    caption(judged, "What each found, run from seeds that it was not tuned on: means and 95 % "
            "intervals. The grid's best was chosen by these very seeds.")  # fmt: skip
    return {"search": searched, "schedules": found, "judged": judged}


def _best_of_grid(dataset: xr.Dataset) -> tuple[dict[str, float], np.ndarray]:
    """The rate and momentum of least mean loss, and its losses, a judge each."""
    losses = dataset.grid_loss.transpose("grid_rate", "grid_momentum", "grid_seed")
    means = losses.mean("grid_seed", skipna=False).values
    i, j = np.unravel_index(np.nanargmin(means), means.shape)
    at = {"rate": float(losses.grid_rate[i]), "momentum": float(losses.grid_momentum[j])}
    return at, losses.values[i, j]


def claims(dataset: xr.Dataset) -> list[Claim]:
    """tuning/schedule-beats-constant-rate and tuning/gradient-beats-random-search."""
    at, constant = _best_of_grid(dataset)
    tuned = dataset.squares_judged.sel(by="gradient").values
    less = mean_interval(np.log(constant / tuned))
    beats = less is not None and less[0] > 0
    claim = Claim(
        id="tuning/schedule-beats-constant-rate",
        statement="On least squares a schedule of the learning rate tuned by gradient, with "
        "momentum and weight decay, ends lower than the best constant rate of a fine grid.",
        source="beyond the source",
        measured={
            "mean loss above the least, tuned": float(tuned.mean()),
            "mean loss above the least, best constant rate": float(constant.mean()),
            "rates in the grid": dataset.sizes["grid_rate"],
            "the grid's best": at,
            "factor between them (geometric mean)": float(np.exp(np.log(constant / tuned).mean())),
        },
        tolerance="the 95 % interval of the factor, paired by seed, above 1",
        n_runs=int(dataset.grid_loss.size),
        interval=None if less is None else np.exp(less).tolist(),
        verdict=verdict(beats),
        evidence="tuning/judged",
        plain_words="A schedule tuned by gradient beats the best constant rate",
        measured_short="the constant rate ends × "
        + with_interval(
            float(np.exp(np.log(constant / tuned).mean())), None if less is None else np.exp(less)
        )
        + " higher",
    )
    measured, interval, better = {}, {}, []
    for name, title in CASES.items():
        judged = dataset[f"{name}_judged"]
        gradient = judged.sel(by="gradient").values
        for method in ("random", "random_schedule"):
            other = judged.sel(by=method).values
            key = f"{title}: loss of {METHODS[method]} less that of gradient"
            measured[key] = float((other - gradient).mean())
            interval[key] = mean_interval(other - gradient)
            better.append(interval[key] is not None and interval[key][0] > 0)
    both = Claim(
        id="tuning/gradient-beats-random-search",
        statement="At equal cost descent on the hyperparameters finds better ones than a random "
        "search, over the same schedule or over one constant rate.",
        source="beyond the source",
        measured=measured,
        tolerance="all four 95 % intervals, paired by seed, above 0",
        n_runs=int(sum(dataset[f"{name}_random"].size for name in CASES)),
        interval=interval,
        verdict=verdict(all(better), reasoning=any(better)),
        evidence="tuning/search",
        plain_words="Descent on hyperparameters beats random search of equal cost",
        measured_short=f"better in {sum(better)} of {len(better)} comparisons",
    )
    return [claim, both]
