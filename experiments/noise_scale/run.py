"""Does the gradient noise scale, cheap along one run, predict the critical batch of many runs?"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import xarray as xr

from optjax.experiments.noise_scale import families
from optjax.experiments.noise_scale.claims import claims as claims
from optjax.experiments.noise_scale.figures import figures as figures
from optjax.support.console import silent
from optjax.support.errors import UserError


@dataclass(frozen=True)
class Config:
    """Is the critical batch size of steps to a target what B_simple along one run says?

    Command: optjax run noise_scale. Cost: 75 s on two cores; --full 2 to 3 minutes.
    Expect: the right order and no more: within a factor of 3 on the network, 2 to 14 times too
    large on noisy quadratics, 20 to 40 times on least squares with curvatures 44 times apart.
    """

    data: str | None = None
    """Pictures for the network: FILE.npz, FOLDER/ or cifar10; without it, embedded photographs."""
    seed: int = 0
    """Seed of the data; runs have the seeds 0, 1, …"""
    spectrum: int = 200
    """d of the noisy quadratic, h = 1/i."""
    rows: int = 1024
    """n of least squares."""
    columns: int = 8
    """d of least squares."""
    noises: tuple[float, ...] = (0.0, 0.5, 1.0, 2.0, 4.0)
    """Standard deviation of the targets' noise over that of the signal, one problem each."""
    squares_batches: tuple[int, ...] = (1, 4, 16, 64, 256, 1024)
    """Batch sizes of least squares."""
    squares_rates: int = 9
    """Learning rates of least squares, from 1/1000 of 2/λ_max to it."""
    squares_seeds: int = 4
    """Runs of least squares for every rate and batch."""
    squares_steps: int = 1500
    """Most steps of such a run."""
    squares_target: float = 0.05
    """Loss above the least, over that at the start."""
    pictures: int = 128
    """Tiles of 16 × 16 that the network trains on."""
    filters: int = 8
    """NF of the network."""
    colours: int = 8
    """NC of the network."""
    net_batches: tuple[int, ...] = (4, 8, 16, 64)
    """Batch sizes of the network."""
    net_rates: int = 4
    """Learning rates of the network."""
    net_seeds: int = 3
    """Runs of the network for every rate and batch."""
    net_steps: int = 160
    """Most steps of such a run."""
    net_every: int = 4
    """Steps from record to record."""
    net_targets: tuple[float, ...] = (1.6, 1.4)
    """Loss of all pictures in training mode (nats a pixel)."""
    net_blocks: int = 16
    """Batch size whose noise is measured on the network."""
    net_span: tuple[float, float] = (0.08, 1.0)
    """Lowest and highest learning rate of the network."""
    net_scale_seeds: int = 4
    """Runs of the network along which the scale is measured."""
    repeats: int = 500
    """Experiments with estimators where the truth is known."""
    pairs: int = 256
    """Most pairs of such an experiment."""


FULL = {
    "squares_rates": 12,
    "squares_seeds": 6,
    "net_rates": 5,
    "net_scale_seeds": 6,
    "repeats": 1000,
}
"""The sizes of RESULTS.md."""


def run(config: Config, progress: Callable[[str, float], None] = silent) -> xr.Dataset:
    """Prediction and measurement on every problem; the estimator where the truth is known."""
    if not config.noises or not config.net_targets:
        raise UserError("noises or net_targets are empty: expected at least one of each")
    progress("noisy quadratic", 0.0)
    with jax.enable_x64(True):
        points = families.quadratics(config)
    more, found = families.squares(
        config, lambda text, f: progress(f"least squares: {text}", 0.1 + 0.4 * f)
    )
    points += more
    more, net = families.net(config, lambda text, f: progress(f"network: {text}", 0.5 + 0.4 * f))
    progress("estimators", 0.95)
    parts = [_table(points + more), found, net, families.ratios(config), families.coverage(config)]
    runs = (
        len(config.noises) * len(config.squares_batches) * config.squares_rates
        * config.squares_seeds
        + len(config.net_batches) * config.net_rates * config.net_seeds
    )  # fmt: skip
    attrs = {"repeats": config.repeats, "runs": runs}
    return xr.merge(parts, join="outer").assign_attrs(found.attrs | net.attrs | attrs)


def _table(points: list[families.Measurement]) -> xr.Dataset:
    """All points, those with fewer batch sizes filled up with NaN."""
    most = max(len(p.sizes) for p in points)
    sizes, steps = np.full((2, len(points), most), np.nan)
    for i, p in enumerate(points):
        sizes[i, : len(p.sizes)], steps[i, : len(p.sizes)] = p.sizes, p.steps
    unknown = np.full(3, np.nan)
    rows = {"critical": np.array([p.fit for p in points])}
    rows |= {s: np.array([p.scales.get(s, unknown) for p in points]) for s in families.SCALES}
    found: dict[str, Any] = {}
    for name, values in rows.items():
        found[name] = ("point", values[:, 0])
        found[f"{name}_interval"] = (("point", "bound"), values[:, 1:])
    found |= {"size": (("point", "nth"), sizes), "steps": (("point", "nth"), steps)}
    found["S_min"] = ("point", [p.S_min for p in points])
    coords = {"point": [p.name for p in points], "family": ("point", [p.family for p in points])}
    return xr.Dataset(found, coords | {"bound": families.BOUND})
