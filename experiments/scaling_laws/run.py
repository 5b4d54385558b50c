"""More compute: a larger model, more steps or a larger batch? What do published laws say?"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import xarray as xr

from optjax import scaling
from optjax.experiments.scaling_laws import analysis, by_width
from optjax.experiments.scaling_laws.claims import claims as claims
from optjax.experiments.scaling_laws.figures import figures as figures
from optjax.support.console import silent
from optjax.support.errors import UserError, whole

POINTS = "chinchilla_points.csv"
OUTLIERS = 5
FIELDS = ("E", "A", "B", "alpha", "beta", "a", "b")
OF = ("value", "low", "high", "error")
"""A value, the ends of its 95 % interval, its standard error."""


@dataclass(frozen=True)
class Config:
    """With more compute, is the model's size what should grow first, and by which power of it?

    Command: optjax run scaling_laws [--data FILE.npz] [--points chinchilla_points.csv].
    Cost: 140 s on two cores; --full 5 minutes.
    Expect: the best width grows with the budget, by a power that three seeds leave between 0.1 and
    1.2, and yet more steps lower the loss more than a larger width does; on Hoffmann's points
    α = 0.347, β = 0.367.
    """

    data: str | None = None
    """Pictures: FILE.npz, FOLDER/ or cifar10; without it, tiles of embedded photographs."""
    points: str | None = None
    """CSV of Hoffmann's points; without it, chinchilla_points.csv in the folder of `data`."""
    seed: int = 0
    """Seed of the tiles drawn and of the resamples; runs have the seeds 0, 1, …"""
    nets: tuple[str, ...] = ("conv-transpose",)
    """Networks; batches and numbers of pictures are varied on the first."""
    filters: tuple[int, ...] = (4, 8, 16, 32)
    """NF: at least three widths."""
    colours: int = 8
    """Of the palette. The last layer's size follows from it alone, so that with many colours a
    narrow network costs nearly as much as a wide one."""
    size: int = 16
    """Side of a tile, pixels."""
    pictures: int = 8192
    """Training tiles, or what there is."""
    held_out: int = 192
    """Held-out tiles."""
    batch: int = 64
    """Tiles a step; half and twice as many are tried beside it."""
    rates: tuple[float, ...] = (0.003, 0.01)
    """Adam's rates: at every record the better one counts."""
    seeds: int = 3
    """Runs of each setting: what intervals are over."""
    steps: int = 96
    """Of the widest network; narrower ones get as many as the same FLOPs buy …"""
    most_steps: int = 384
    """… up to these."""
    every: int = 8
    """Steps from record to record."""
    subsets: tuple[int, ...] = (64,)
    """Numbers of training tiles for L(N, data)."""
    budgets: int = 9
    """Budgets at which the best width is sought."""
    resamples: int = 4000
    """Of every bootstrap."""


FULL = {
    "nets": ("conv-transpose", "unet"),
    "subsets": (64, 256, 1024),
}
"""The sizes of RESULTS.md."""


def run(config: Config, progress: Callable[[str, float], None] = silent) -> xr.Dataset:
    """Hoffmann's refit, trainings of all widths, batches and subsets, and what follows of them."""
    widths = sorted(set(config.filters))
    if len(widths) < 3:
        raise UserError(f"filters holds {len(widths)} widths: expected at least 3 different ones")
    for name, least in (("seeds", 2), ("batch", 2), ("every", 1), ("budgets", 4), ("held_out", 1)):
        whole(name, getattr(config, name), least)
    if config.steps // config.every < 8:
        raise UserError(
            f"steps is {config.steps}: expected at least 8 × every = {8 * config.every}"
        )
    if not config.nets or not config.rates or not min(config.rates) > 0:
        raise UserError("nets or rates are empty, or a rate is not above 0: give at least one")
    found = _refit(config, lambda text, f: progress(text, 0.05 * f))
    pictures = by_width.tiles(
        config.data, config.size, config.colours, (config.pictures, config.held_out),
        2 * config.batch, config.seed,
    )  # fmt: skip
    nets = []
    for i, net in enumerate(config.nets):
        share = 0.7 / len(config.nets)

        def shown(text: str, f: float, i: int = i, share: float = share) -> None:
            progress(text, 0.05 + share * (i + f))

        nets.append(_widths(config, net, widths, pictures, shown))
    others = _others(config, nets[0], pictures, lambda text, f: progress(text, 0.75 + 0.2 * f))
    progress("fitting laws", 0.95)
    trained = xr.concat(nets, "net", join="outer").assign_coords(net=list(config.nets))
    checks = scaling.contradictions()
    published = xr.Dataset(
        {"published": (("check", "kind"), [[c.printed, c.computed] for c in checks])},
        {"check": [c.what for c in checks], "kind": ["printed", "computed"]},
    )
    parts = [found, trained, others, published, *_laws(config, trained, others)]
    dataset: xr.Dataset = xr.merge(parts, join="outer", compat="no_conflicts")
    dataset.attrs = {
        "demo": int(pictures.demo), "data": pictures.name, "tiles": len(pictures.train[0]),
        "batch": config.batch, "middle": _middle(widths), "middle_steps": _half(config),
        "hoffmann_points": int("points_loss" in found), "resamples": config.resamples,
    }  # fmt: skip
    return dataset


# ---------------------------------------------------------------------------- Hoffmann's points


def _points_file(config: Config) -> Path | None:
    if config.points is not None:
        return Path(config.points)
    if config.data is None:
        return None
    data = Path(config.data)
    beside = (data if data.is_dir() else data.parent) / POINTS
    return beside if beside.is_file() else None


def _refit(config: Config, progress: Callable[[str, float], None]) -> xr.Dataset:
    """The law fitted to Hoffmann's points; an empty dataset where they are not there."""
    path = _points_file(config)
    if path is None:
        return xr.Dataset()
    progress("Hoffmann's points", 0.0)
    every, _ = scaling.read_runs(path, needed=("loss", "N", "D"))
    points = scaling.drop_highest(every, OUTLIERS)
    found = scaling.fit(points, "hoffmann")
    refits = scaling.bootstrap(found, config.resamples, jax.random.key(config.seed))
    progress("outliers", 0.6)
    without = scaling.outliers(every, "hoffmann", 2 * OUTLIERS)
    law = _described(found, refits)
    return xr.Dataset(
        {
            "points_N": ("point", points.N),
            "points_D": ("point", points.D),
            "points_loss": ("point", points.loss),
            "hoffmann": (("field", "of"), law),
            "hoffmann_objective": found.objective,
            "paper_objective": scaling.objective(points, scaling.HOFFMANN_2022),
            "refit_objective": scaling.objective(points, scaling.BESIROGLU_2024),
            "hoffmann_failed": refits.failed,
            "outlier_law": (("left_out", "field"), _by_field(without.law)),
        },
        {"field": list(FIELDS), "of": list(OF), "left_out": without.left_out},
    )


def _by_field(law: scaling.Hoffmann) -> np.ndarray:
    """E, A, B, α, β and the powers a, b of the budget by which N and D grow, (..., fields)."""
    share = scaling.hoffmann_exponents(law)
    return np.stack([np.asarray(x, float) for x in (*law, share.N, share.D)], axis=-1)


def _described(found: scaling.Fit, refits: scaling.Bootstrap) -> np.ndarray:
    """Value, ends of the 95 % interval and standard error of each field, (fields, 4)."""
    each = scaling.intervals(refits)
    return np.array([each[name] for name in FIELDS])


# ----------------------------------------------------------------------------------- trainings


def _middle(widths: list[int]) -> int:
    """The width at which the batch is varied; it has a neighbour on either side."""
    return widths[min(len(widths) // 2, len(widths) - 2)]


def _half(config: Config) -> int:
    """The steps at which batch, width and steps are compared: about half of the widest's."""
    return config.steps // 2 // config.every * config.every


def _widths(
    config: Config, net: str, widths: list[int], pictures: by_width.Tiles,
    progress: Callable[[str, float], None],
) -> xr.Dataset:  # fmt: skip
    size = by_width.sizes(net, widths, config.colours, config.size)
    longest = config.steps * size.flops.max() / size.flops // config.every * config.every
    steps = {w: int(min(config.most_steps, s)) for w, s in zip(widths, longest, strict=True)}
    losses = by_width.train(
        net, steps, config.batch, pictures, config.rates, config.seeds, config.every, progress,
        colours=config.colours,
    )  # fmt: skip
    return xr.Dataset(
        {
            "loss": losses.isel(pictures=0, drop=True),
            "parameters": ("filters", size.parameters),
            "flops": ("filters", size.flops * config.batch),
        }
    )


def _others(
    config: Config, trained: xr.Dataset, pictures: by_width.Tiles,
    progress: Callable[[str, float], None],
) -> xr.Dataset:  # fmt: skip
    """Half and twice the batch at the middle width; subsets at that and the narrowest.

    The runs on all tiles, of which every subset's are compared with, are there in `trained`.
    """
    net, widths = config.nets[0], trained.filters.values.tolist()
    middle, n = _middle(widths), len(pictures.train[0])
    subsets = sorted({whole("subsets", k, 1) for k in config.subsets if k < n})
    batches = [config.batch // 2, config.batch * 2]
    common = (config.rates, config.seeds)

    def shown(part: int) -> Callable[[str, float], None]:
        return lambda text, f: progress(text, (part + f) / 3)

    by_batch = [
        by_width.train(
            net, {middle: _half(config)}, size, pictures, *common, config.every,
            shown(i), colours=config.colours,
        ).isel(filters=0, pictures=0, drop=True)
        for i, size in enumerate(batches)
    ]  # fmt: skip
    steps, two = config.steps // config.every * config.every, [widths[0], middle]
    by_subset = [trained.loss.sel(filters=two, step=slice(0, steps)).expand_dims(pictures=[n])]
    if subsets:
        found = by_width.train(
            net, dict.fromkeys(two, steps), config.batch, pictures, *common,
            config.every, shown(2), colours=config.colours, subsets=subsets,
        )  # fmt: skip
        by_subset.insert(0, found)
    together = xr.concat(by_subset, "pictures")
    return xr.Dataset(
        {
            "batch_loss": xr.concat(by_batch, "batch_size").rename(step="batch_step"),
            "subset_loss": together.rename(step="subset_step", filters="subset_filters"),
        },
        {"batch_size": batches},
    )


# ---------------------------------------------------------------------------------------- laws


def _laws(config: Config, trained: xr.Dataset, others: xr.Dataset) -> list[xr.Dataset]:
    """L(N, D) of each network with its best widths; L(N, data) of the subsets."""
    key = jax.random.key(config.seed)
    best = analysis.best_rate(trained.loss).transpose("net", "filters", "seed", "step")
    steps = best.step.values.astype(float)
    nets = []
    for i in range(best.sizes["net"]):
        curves, N = best.values[i], trained.parameters.values[i].astype(float)
        cost = trained.flops.values[i]
        front = analysis.frontier(curves, steps, N, cost, config.budgets)

        def fitted(losses: np.ndarray, most: float = np.inf) -> scaling.Fit | None:
            points = analysis.law_points(losses, steps, N, cost, config.batch)  # noqa: B023
            return analysis.fitted(points.take(most >= points.C), "hoffmann")

        nets.append(
            xr.Dataset(
                {
                    "budget": ("budget_index", front.budgets),
                    "budget_loss": (("budget_index", "filters", "seed"), front.loss),
                    "best_N": (("budget_index", "seed"), front.best),
                    "best_at_end": (("budget_index", "seed"), front.at_end),
                    **_law(config, fitted, curves, front.budgets, N, cost, key),
                },
                {"field": list(FIELDS), "of": list(OF), "filters": best.filters},
            )
        )
    return [
        xr.concat(nets, "net").assign_coords(net=best.net),
        _subset_law(config, trained, others, key),
    ]


def _law(
    config: Config, fitted: Callable[..., scaling.Fit | None], curves: np.ndarray,
    budgets: np.ndarray, N: np.ndarray, cost: np.ndarray, key: jax.Array,
) -> dict[str, tuple]:  # fmt: skip
    """The law of the seeds' mean, of each seed, and what that of the smaller budgets foretells."""
    law = np.full((len(FIELDS), len(OF)), np.nan)
    whole_fit = fitted(curves.mean(axis=1))
    if whole_fit is not None:
        law = _described(whole_fit, scaling.bootstrap(whole_fit, config.resamples, key))
    each = np.full((len(FIELDS), curves.shape[1]), np.nan)
    told = np.full((len(budgets), curves.shape[1]), np.nan)
    for s in range(curves.shape[1]):
        found = fitted(curves[:, s])
        if found is not None:
            each[:, s] = _by_field(found.law)
        small = fitted(curves[:, s], float(np.sqrt(budgets[0] * budgets[-1])))
        if small is not None:
            told[:, s] = analysis.foretold(small.law, budgets, N, cost, config.batch)
    return {
        "law": (("field", "of"), law),
        "law_of_seed": (("field", "seed"), each),
        "foretold_N": (("budget_index", "seed"), told),
    }


def _subset_law(
    config: Config, trained: xr.Dataset, others: xr.Dataset, key: jax.Array
) -> xr.Dataset:
    """Kaplan's L(N, D), D the tiles that there are, each run stopped at its least held-out loss."""
    least = analysis.best_rate(others.subset_loss).min("subset_step")
    least = least.transpose("subset_filters", "pictures", "seed")
    N = trained.parameters.isel(net=0).sel(filters=least.subset_filters.values)
    shape = least.shape
    sizes = [
        np.broadcast_to(np.reshape(x, form), shape).ravel()
        for x, form in ((N.values, (-1, 1, 1)), (least.pictures.values, (1, -1, 1)))
    ]
    keep = np.isfinite(least.values).ravel()
    points = scaling.runs(*(x[keep] for x in (least.values.ravel(), *sizes)))
    found = analysis.fitted(points, "kaplan-nd")
    law = np.full((2, len(OF)), np.nan)
    if found is not None:
        each = scaling.intervals(scaling.bootstrap(found, config.resamples, key))
        law = np.array([each[name] for name in ("alpha_N", "alpha_D")])
    return xr.Dataset(
        {"subset_least": least, "subset_law": (("power", "of"), law)},
        {"power": ["alpha_N", "alpha_D"], "of": list(OF)},
    )
