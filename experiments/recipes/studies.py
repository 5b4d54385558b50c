"""The recipes that are compared: a network and the way it is trained, and studies of several."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import optax
from flax.linen import Module

from optjax.colourisation.networks import NETWORKS
from optjax.run.optimizers import Factory

OPTIMISERS: dict[str, Factory] = {
    "Adam": optax.adam,
    "AdamW": partial(optax.adamw, weight_decay=0.03),
    "schedule-free Adam": optax.contrib.schedule_free_adamw,
}


@dataclass(frozen=True)
class Recipe:
    """A network and the way it is trained; by default UNet by the source's protocol.

    Attributes:
      net: of `NETWORKS`; filters: NF; kernel: k.
      options: further attributes of the network.
      batch_size: pictures a step.
      share: its steps, over those of the others.
      learning_rate: the highest.
      cosine: whether the rate falls to 0 along a half cosine.
      optimiser: of `OPTIMISERS`.
      mirrored: whether it trains on the mirror images, too.
      counted: whether the table of a residual network begins at what training pictures have.
      rebalance: whether rare colours weigh more in the loss; see `rebalanced`.
    """

    net: str = "unet"
    filters: int = 32
    kernel: int = 3
    options: Mapping[str, Any] = field(default_factory=dict)
    batch_size: int = 100
    share: float = 1.0
    learning_rate: float = 1e-3
    cosine: bool = False
    optimiser: str = "Adam"
    mirrored: bool = False
    counted: bool = False
    rebalance: bool = False

    def network(self, colours: int, shrink: int = 1) -> Module:
        """Make the network, its filters divided by `shrink`."""
        filters = max(2, self.filters // shrink)
        return NETWORKS[self.net](
            filters=filters, colours=colours, kernel=self.kernel, **self.options
        )


UNET = Recipe()
OURS = Recipe("residual", filters=16, learning_rate=6e-3, cosine=True, counted=True, mirrored=True)

_CHANGES: dict[str, dict[str, Any]] = {
    "rate 6e-3": {"learning_rate": 6e-3},
    "cosine schedule": {"cosine": True},
    "residual network": {"net": "residual", "filters": 16, "options": {"levels": 0}},
    "table of the grey level": {"options": {}},
    "table begun at the counts": {"counted": True},
    "mirror images": {"mirrored": True},
}


def _one_after_another() -> dict[str, Recipe]:
    """List the recipes between the source's UNet and ours, one change at a time."""
    recipe, found = UNET, {"unet, the source's way": UNET}
    for name, change in _CHANGES.items():
        recipe = replace(recipe, **change)
        found[f"+ {name}"] = recipe
    return found


STUDIES: dict[str, dict[str, Recipe]] = {
    "comparison": {
        "pool-upsample": replace(UNET, net="pool-upsample"),
        "conv-transpose": replace(UNET, net="conv-transpose"),
        "unet": UNET,
        "ours": OURS,
    },
    "ours": {"ours": OURS},
    "ablation": {
        **_one_after_another(),
        "ours, rate 3e-3": replace(OURS, learning_rate=3e-3),
        "ours, two blocks a size": replace(OURS, options={"blocks": 2}),
        "ours, 24 filters": replace(OURS, filters=24),
        "ours, AdamW": replace(OURS, optimiser="AdamW"),
        "ours, schedule-free": replace(
            OURS, optimiser="schedule-free Adam", cosine=False, learning_rate=6e-3
        ),
    },
    "rebalancing": {"ours": OURS, "ours, rebalanced": replace(OURS, rebalance=True)},
    "skips": {
        "no skips": replace(UNET, options={"skips": ()}),
        "from the input": replace(UNET, options={"skips": ("input",)}),
        "from stage 1": replace(UNET, options={"skips": ("stage",)}),
        "both (unet)": UNET,
    },
    "kernels": {f"kernel {k}": replace(UNET, kernel=k) for k in (3, 4, 5, 7)},
    "batches": {
        **{
            f"batch {b}, equal epochs": replace(UNET, batch_size=b, share=100 / b)
            for b in (32, 64, 128, 256, 512)
        },
        **{f"batch {b}, equal steps": replace(UNET, batch_size=b) for b in (32, 64, 128, 256, 512)},
    },
    "widths": {
        **{f"unet, {f} filters": replace(UNET, filters=f) for f in (8, 16, 32)},
        **{f"ours, {f} filters": replace(OURS, filters=f) for f in (8, 16, 24)},
    },
}
