"""How many steps does a larger batch save, where does it stop, and what helps beyond?"""

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import xarray as xr

from optjax.batch_size.critical_batch_size import critical_batch_size
from optjax.batch_size.regimes import local_slope, regime
from optjax.batch_size.steps_law import fit_critical_batch
from optjax.batch_size.steps_to_target import StepsToTarget, steps_table, steps_to_target
from optjax.colourisation import networks
from optjax.colourisation.problem import colourisation_problem
from optjax.experiments.batch_problems import WholeLoss, drawn_tiles, spread_squares
from optjax.experiments.batch_size_and_steps.claims import OPTIMISERS
from optjax.experiments.batch_size_and_steps.claims import claims as claims
from optjax.experiments.batch_size_and_steps.figures import figures as figures
from optjax.run.problems import Problem, least_squares
from optjax.run.trajectory import make_run
from optjax.support.console import silent
from optjax.support.errors import UserError, nearest
from optjax.support.machine import quick_jit
from optjax.sweeps import sweep
from optjax.sweeps.stop_rules import Target
from optjax.theory.noisy_quadratic import noisy_quadratic
from optjax.theory.quadratic_steps import fewest_steps


@dataclass(frozen=True)
class Config:
    """How do the steps to a target depend on the batch, for optimisers of first and second order?

    Command: optjax run batch_size_and_steps. Cost: 120 s on two cores; --full 6 min.
    Expect: each doubling halves the steps while noise dominates; then it buys almost nothing, and
    a preconditioned optimiser does. The knee is at the critical batch size.
    """

    data: str | None = None
    """Pictures for the network: FILE.npz, FOLDER/ or cifar10; without it, embedded photographs."""
    seed: int = 0
    """Seed of the data; runs have the seeds 0, 1, …"""
    optimisers: tuple[str, ...] = ("SGD", "preconditioned")
    """Of SGD, momentum, Adam and preconditioned; the claims need the default two."""
    spectrum: int = 1000
    """d of the quadratic: curvatures 1, 1/2, …, 1/d, the gradient's variance the same."""
    exponents: tuple[int, ...] = field(default=(1, 2, 3, 4, 5, 6, 7, 8), metadata={"least": 0})
    """k of the quadratic's batch sizes 4ᵏ; with momentum, every third."""
    risk: float = 0.01
    """Target of the quadratic, of a first risk of 4.9."""
    rows: int = 512
    """n of least squares."""
    columns: int = 24
    """d of least squares."""
    batches: tuple[int, ...] = (2, 4, 8, 16, 32, 64, 128, 256, 512)
    """Batch sizes of least squares."""
    rates: int = 8
    """Learning rates of least squares for every optimiser."""
    seeds: int = 5
    """Runs of least squares for every optimiser, rate and batch."""
    steps: int = 1500
    """Most steps of least squares."""
    excess: float = 0.05
    """Target of least squares: loss above the least, in units of the noise's variance."""
    net_batches: tuple[int, ...] = (16, 64, 256)
    """Batch sizes of the network; below 16 the statistics of its batches are another story."""
    net_rates: int = 3
    """Learning rates of the network for every optimiser."""
    net_seeds: int = 4
    """Runs of the network for every optimiser, rate and batch."""
    net_examples: int = 4000
    """Most examples of a run of the network, and at least `net_steps` steps."""
    net_steps: int = 48
    """Most steps of the network at a large batch."""
    net_loss: float = 1.0
    """Target of the network: training loss, nats a pixel."""
    pictures: int = 256
    """Crops of 16 × 16 pixels that the network trains on."""
    filters: int = 8
    """NF of the network."""
    colours: int = 8
    """NC of the network, and of its palette: the last layer's cost grows with its square."""


FULL = {
    "optimisers": OPTIMISERS,
    "spectrum": 10_000,
    "exponents": (1, 2, 3, 4, 5, 6, 7, 8, 9, 10),
    "rates": 12,
    "seeds": 8,
    "steps": 2000,
    "net_seeds": 6,
    "net_examples": 8000,
    "net_steps": 64,
}
"""The sizes of RESULTS.md."""


@dataclass(frozen=True, eq=False)
class Newton:
    """w ← w − η H⁻¹g, for a Hessian that is known."""

    inverse: jax.Array  # (d, d) H⁻¹

    def __call__(self, learning_rate: Any) -> optax.GradientTransformation:
        def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
            return -learning_rate * (self.inverse @ grads), state

        return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def run(config: Config, progress: Callable[[str, float], None] = silent) -> xr.Dataset:
    """Steps to the target for every problem, optimiser and batch size."""
    for name in config.optimisers:
        if name not in OPTIMISERS:
            raise UserError(f"unknown optimiser {name!r}: {nearest(name, OPTIMISERS)}")
    for name in ("SGD", "preconditioned"):
        if name not in config.optimisers:
            raise UserError(f"optimisers lack {name!r}: the claims need it; add it")
    if len(config.exponents) < 3:
        raise UserError(f"exponents are {config.exponents}: expected at least three batch sizes")
    parts = [
        *_quadratic(config, lambda text, f: progress(f"quadratic: {text}", 0.3 * f)),
        *_squares(config, lambda text, f: progress(f"least squares: {text}", 0.3 + 0.2 * f)),
        *_net(config, lambda text, f: progress(f"network: {text}", 0.5 + 0.5 * f)),
    ]
    return xr.merge(parts, join="outer", combine_attrs="drop_conflicts")


def _named(problem: str, optimiser: str, found: xr.Dataset) -> xr.Dataset:
    """The same variables and axes under names of the problem and the optimiser."""
    prefix = f"{problem}_{optimiser}_".replace(" ", "_")
    axes = {name: f"{prefix}{name}" for name in ("learning_rate", "seed") if name in found.dims}
    axes["batch_size"] = f"{problem}_batch_size"
    named = found.rename(axes | {str(name): f"{prefix}{name}" for name in found.data_vars})
    named.attrs = {f"{prefix}notes": found.attrs.get("notes", "")}
    return named


# ------------------------------------------------------------------------------------ problems


def _quadratic(config: Config, progress: Callable[[str, float], None]) -> list[xr.Dataset]:
    ways: dict[str, dict[str, float]] = {
        "SGD": {}, "preconditioned": {"power": 0.5}, "momentum": {"momentum": 0.9}
    }  # fmt: skip
    ways = {name: way for name, way in ways.items() if name in config.optimisers}
    h = 1 / np.arange(1, config.spectrum + 1.0)
    found = []
    with jax.enable_x64(True):
        for i, (name, way) in enumerate(ways.items()):
            best = quick_jit(
                lambda size, way=way: fewest_steps(
                    noisy_quadratic(h, batch_size=size, **way), config.risk
                )
            )
            exponents = config.exponents[:: 3 if name == "momentum" else 1]
            rows = []
            for j, k in enumerate(exponents):
                progress(f"{name}, B = {4**k}", (i + j / len(exponents)) / len(ways))
                rows.append([float(x) for x in best(float(4**k))])
            table = np.array(rows)
            part = xr.Dataset(
                {"steps": ("batch_size", table[:, 1]), "rate": ("batch_size", table[:, 0])},
                {"batch_size": [4**k for k in exponents]},
            )
            if name == "SGD":
                sizes = part.batch_size.values.astype(float)
                fit = fit_critical_batch(sizes, table[:, 1])
                slope = local_slope(sizes, table[:, 1])
                for key, value in fit._asdict().items():
                    part[key] = float(value)
                part["slope"] = "batch_size", slope
                part["regime"] = "batch_size", regime(slope)
            found.append(_named("quadratic", name, part))
    return found


def _squares(config: Config, progress: Callable[[str, float], None]) -> list[xr.Dataset]:
    n = config.rows
    if max(config.batches) > n:
        raise UserError(f"batches holds {max(config.batches)}: expected 1 to rows = {n}")
    X, t, least, cap = spread_squares(n, config.columns, config.seed, signal=3.0)
    inverse = np.linalg.inv(2 * X.T @ X / n).astype(np.float32)
    ways = {
        "SGD": (optax.sgd, np.geomspace(cap / 300, 1.2 * cap, config.rates)),
        "momentum": (
            functools.partial(optax.sgd, momentum=0.9),
            np.geomspace(cap / 3000, 1.2 * cap, config.rates),
        ),
        "Adam": (optax.adam, np.geomspace(0.003, 1, config.rates)),
        "preconditioned": (Newton(jnp.asarray(inverse)), np.geomspace(0.003, 1.5, config.rates)),
    }
    ways = {name: way for name, way in ways.items() if name in config.optimisers}
    problem = least_squares(X.astype(np.float32), t.astype(np.float32))
    found = []
    for i, (name, (optimiser, rates)) in enumerate(ways.items()):
        table = _table(
            problem, optimiser, rates, dict.fromkeys(config.batches, config.steps),
            config.seeds, 1000, least + config.excess,
            lambda text, f, i=i, name=name: progress(f"{name}: {text}", (i + f) / len(ways)),
        )  # fmt: skip
        found.append(_named("squares", name, critical_batch_size(table)))
    return found


def _net(config: Config, progress: Callable[[str, float], None]) -> list[xr.Dataset]:
    tiles = drawn_tiles(
        config.data, config.pictures, config.seed, config.net_batches, crop=16,
        colours=config.colours,
    )  # fmt: skip
    net = networks.model("conv-transpose", filters=config.filters, colours=config.colours)
    problem = colourisation_problem(net, tiles)
    muon = functools.partial(optax.contrib.muon, muon_weight_dimension_numbers=_matrices)
    span = functools.partial(np.geomspace, num=config.net_rates)
    ways = {
        "SGD": (optax.sgd, span(0.1, 1.2)),
        "momentum": (functools.partial(optax.sgd, momentum=0.9), span(0.02, 0.5)),
        "Adam": (optax.adam, span(0.005, 0.08)),
        "preconditioned": (muon, span(0.03, 0.4)),
    }
    ways = {name: way for name, way in ways.items() if name in config.optimisers}
    steps = {b: max(config.net_steps, config.net_examples // b) for b in config.net_batches}
    found = []
    for i, (name, (optimiser, rates)) in enumerate(ways.items()):
        table = _table(
            problem, optimiser, rates, steps, config.net_seeds, 18, config.net_loss,
            lambda text, f, i=i, name=name: progress(f"{name}: {text}", (i + f) / len(ways)),
        )  # fmt: skip
        found.append(_named("net", name, critical_batch_size(table, statistic="mean")))
    return found


def _matrices(params: Any) -> Any:
    """For Muon, a kernel (k, k, in, out) is a matrix (k·k·in, out)."""
    whole = optax.contrib.MuonDimensionNumbers((0, 1, 2), (3,))
    return jax.tree.map(lambda w: whole if w.ndim == 4 else None, params)


def _table(
    problem: Problem,
    optimiser: Any,
    rates: np.ndarray,
    steps: dict[int, int],
    seeds: int,
    records: int,
    target: float,
    progress: Callable[[str, float], None],
) -> StepsToTarget:
    """Steps to the target, batch sizes of as many steps (`steps`) in one sweep."""
    problem = dataclasses.replace(problem, metrics=WholeLoss(problem.loss))
    budgets: dict[int, list[int]] = {}
    for size, most in steps.items():
        budgets.setdefault(most, []).append(size)
    parts = []
    for i, (most, sizes) in enumerate(budgets.items()):
        every = max(1, most // records)
        found = sweep(
            make_run(
                problem, optimiser, every * (most // every), max_batch_size=max(sizes),
                record_every=every,
            ),
            {"learning_rate": rates, "batch_size": sizes},
            seeds,
            stop=Target(target, "whole_loss"),
            progress=lambda text, f, i=i: progress(text, (i + f) / len(budgets)),
        )  # fmt: skip
        parts.append(steps_to_target(found, target, "whole_loss"))
    joined = (np.concatenate([part[k] for part in parts]) for k in (0, 2, 3))
    sizes_B, steps_BRS, censored_BRS = joined
    return steps_table(sizes_B, parts[0].rates, steps_BRS, censored_BRS)
