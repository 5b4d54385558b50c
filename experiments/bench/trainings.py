"""Whole trainings of the three networks from many seeds, as `oj.sweep` gives them."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optjax.accounting.account import account
from optjax.colourisation.networks import MODELS
from optjax.colourisation.palette import grey, load_palette, nearest_colour
from optjax.colourisation.pictures import load_pictures
from optjax.colourisation.problem import colourisation_problem
from optjax.run.trajectory import make_run
from optjax.support.console import silent
from optjax.sweeps import sweep

from . import nets
from .measure import Entry, Side, seconds

NAMES = ("conv-transpose", *(name for name in MODELS if name != "conv-transpose"))
"""The first one tells most about a device, should time run out."""

PICTURES, PALETTE = "cifar10_horses.npz", "horses_palette24.npy"
PASSES = 5
"""Over an activation, at least: written and read forward; read, its gradient written, and read."""

ROUNDS, LONG = 3, 5.0
"""How often a training is measured; once if it takes more seconds than this."""


class TrainingSizes(NamedTuple):
    """The source's protocol: 25 epochs of 50 batches."""

    net: nets.NetSizes = nets.NetSizes()
    batches: int = 50
    epochs: int = 25
    seeds: tuple[int, ...] = (1, 8, 64, 256)

    def __str__(self) -> str:
        return f"{self.epochs} epochs of {self.batches} steps, {self.net}"


QUICK = TrainingSizes(nets.QUICK, batches=2, epochs=2, seeds=(2,))


def training_data(sizes: TrainingSizes) -> tuple[tuple[np.ndarray, np.ndarray], str]:
    """Grey pictures and labels, and what they are: OPTJAX_DATA's horses, or noise."""
    folder, count = os.environ.get("OPTJAX_DATA"), sizes.batches * sizes.net.batch_size
    if folder and sizes.net.side == 32 and (Path(folder) / PICTURES).is_file():
        found = load_pictures(str(Path(folder) / PICTURES)).train[:count]
        palette = load_palette(Path(folder) / PALETTE, sizes.net.colours)
        return (grey(found), nearest_colour(found, palette)), f"{len(found)} of {PICTURES}"
    return nets.pictures(sizes.net, sizes.batches), f"{count} pictures of noise"


@dataclass
class Training:
    """A network from `seeds` seeds, side by side.

    Args:
      data: pictures and labels. limits: "copy" or one of `PRECISIONS` → what was measured of it.
      earlier: trainings that come before; they tell how long this one takes.
    """

    name: str
    seeds: int
    dtype: str
    sizes: TrainingSizes
    data: tuple[np.ndarray, np.ndarray]
    limits: Callable[[str], float | None]
    earlier: list["Training"]
    preparing: float = 0.0  # seconds of compiling and choosing a layout
    seconds: list[float] = field(default_factory=list)  # of all seeds, compiled

    def entry(self) -> Entry:
        """This training as a benchmark."""
        return Entry(
            f"train/{self.name}/{self.seeds}" + ("" if self.dtype == "float32" else "/bfloat16"),
            f"{self.seeds} trainings of {self.name} in {self.dtype} ({self.sizes})",
            "s",
            None,
            self._prepare,
            cost=self.cost,
        )

    def cost(self) -> float:
        """Compile, train, train again: as an earlier training of fewer seeds, in proportion."""
        known = [t for t in self.earlier if t.seconds and t.seeds <= self.seeds]
        if not known:
            return 0.0
        # The largest, and of those the last.
        best = max(reversed(known), key=lambda t: t.seeds)
        return best.preparing + 2 * median(best.seconds) * self.seeds / best.seeds

    def _prepare(self, entry: Entry) -> list[Side]:
        sizes, batch = self.sizes, self.sizes.net.batch_size
        more: dict[str, Any] = {} if self.dtype == "float32" else {"dtype": jnp.bfloat16}
        net = MODELS[self.name](filters=sizes.net.filters, colours=sizes.net.colours, **more)
        side = sizes.net.side
        counts = account(net, (side, side, 1), batch=batch)
        run = make_run(
            colourisation_problem(net, self.data),
            optax.adam,
            sizes.epochs * sizes.batches,
            sampler="epochs",
            max_batch_size=batch,
            record_every=sizes.batches,
        )
        grid = {"learning_rate": [nets.RATE]}
        before = _peak_bytes()
        first = sweep(run, grid, self.seeds, progress=silent)
        peak = _peak_bytes()
        group = next(g for g in json.loads(first.attrs["groups"]) if "layout" in g)
        self.preparing = group["seconds to prepare"]
        entry.facts |= {
            "seeds": self.seeds,
            "pictures": self.seeds * sizes.epochs * sizes.batches * batch,
            "seconds_to_compile": self.preparing,
            "seconds_first_call": first.attrs["seconds"],
            "layout": group["layout"],
            "layout_why": group["why"],
            "training_flops_a_picture": counts.training_flops / batch,
            "least_bytes_a_picture": PASSES * counts.outputs * jnp.dtype(self.dtype).itemsize,
            # The device tells the most since the process began.
            "peak_gib": peak / 2**30 if peak and peak > (before or 0) else None,
            "final_loss": float(first.final_loss.mean()),
        }

        def again() -> float:
            taken = seconds(lambda: sweep(run, grid, self.seeds, progress=silent) and None)
            self.seconds.append(taken)
            entry.facts |= self._rates(entry.facts)
            return taken

        once = first.attrs["seconds"] - self.preparing > LONG
        return [Side("oj.sweep", again, 1 if once else ROUNDS)]

    def _rates(self, facts: dict[str, Any]) -> dict[str, float | None]:
        taken = median(self.seconds)
        pictures = facts["pictures"] / taken
        peak = self.limits("bfloat16" if self.dtype == "bfloat16" else "float32, default precision")
        copied = self.limits("copy")
        flops, moved = facts["training_flops_a_picture"], facts["least_bytes_a_picture"]
        return {
            "pictures_a_second": pictures,
            "trainings_a_second": self.seeds / taken,
            "of_matrix_peak": pictures * flops / (peak * 1e12) if peak else None,
            "of_copy_bandwidth": pictures * moved / (copied * 1e9) if copied else None,
        }


def trainings(
    sizes: TrainingSizes,
    data: tuple[np.ndarray, np.ndarray],
    limits: Callable[[str], float | None],
) -> list[Training]:
    """The first network, then the others, of all seeds but the most; then these.

    Where the networks take a `dtype`, bfloat16 follows the second largest number of seeds.
    """
    *few, most = sorted(sizes.seeds)
    order = [(name, n) for name in NAMES for n in few]
    order += [(name, most) for name in NAMES]
    found: list[Training] = []
    for name, n in order:
        half = "dtype" in MODELS[name].__dataclass_fields__ and n == (few or [most])[-1]
        for dtype in ("float32", "bfloat16") if half else ("float32",):
            found.append(Training(name, n, dtype, sizes, data, limits, list(found)))
    return found


def _peak_bytes() -> int | None:
    stats = jax.local_devices()[0].memory_stats()
    return stats.get("peak_bytes_in_use") if stats else None
