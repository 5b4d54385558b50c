"""Which padding halves a picture and doubles it back, for kernels of 3, 4, 5 and 7?"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from optjax.convnets.geometry import conv_output_size, solve_padding, transposed_output_size
from optjax.report.claims import Claim, verdict
from optjax.report.style import COLOURS, caption, figure
from optjax.support.console import silent
from optjax.support.errors import UserError

SOURCE = {4: (1, 0), 5: (2, 1)}
"""kernel -> (padding, output padding) that the source gives."""


@dataclass(frozen=True)
class Config:
    """Which padding takes size → size/stride by convolution, and back by a transposed one?

    Command: optjax run padding. Cost: 3 s on two cores.
    Expect: kernel 4 wants padding 1 and output padding 0; kernel 5 wants 2 and 1; no other does.
    """

    size: int = 32
    """Pixels along one side of the picture."""
    stride: int = 2
    """Stride of both convolutions; it divides the size."""
    kernels: tuple[int, ...] = (3, 4, 5, 7)
    """Taps along one side."""


def _jax_sizes(size: int, small: int, k: int, s: int, p: int, o: int) -> tuple[int, int]:
    """The sizes that XLA itself gives: a second opinion that shares no formula with ours."""
    picture, kernel = jnp.zeros((1, 1, size, size)), jnp.zeros((1, 1, k, k))
    down = jax.eval_shape(
        lambda x, w: jax.lax.conv_general_dilated(x, w, (s, s), [(p, p)] * 2), picture, kernel
    )
    edge = k - 1 - p
    up = jax.eval_shape(
        lambda x, w: jax.lax.conv_general_dilated(
            x, w, (1, 1), [(edge, edge + o)] * 2, lhs_dilation=(s, s)
        ),
        jnp.zeros((1, 1, small, small)),
        kernel,
    )
    return down.shape[-1], up.shape[-1]


def run(config: Config, progress: Callable[[str, float], None] = silent) -> xr.Dataset:
    """Sizes for every (kernel, padding, output padding): by formula, by XLA, and solved for."""
    if config.stride < 1 or config.size % config.stride:
        raise UserError(f"stride {config.stride} does not divide size {config.size}; change one")
    s, small = config.stride, config.size // config.stride
    paddings, outputs = np.arange(max(config.kernels) // 2 + 2), np.arange(s)
    shape = (len(config.kernels), len(paddings), len(outputs))
    # 0 stands for "no pixel is left"; every real size is at least 1.
    size = {name: np.zeros(shape, int) for name in ("down", "up", "jax_down", "jax_up")}
    solved = np.zeros(shape, bool)
    for i, k in enumerate(config.kernels):
        progress("kernels", i / len(config.kernels))
        try:
            down = {p.padding for p in solve_padding(k, s, config.size, small)}
            up = {
                (p.padding, p.output_padding)
                for p in solve_padding(k, s, small, config.size, transposed=True)
            }
        except UserError:
            down, up = set(), set()
        for j, p in enumerate(paddings.tolist()):
            for m, o in enumerate(outputs.tolist()):
                solved[i, j, m] = p in down and (p, o) in up
                size["down"][i, j, m] = conv_output_size(config.size, k, s, p)
                size["up"][i, j, m] = transposed_output_size(small, k, s, p, o)
                size["jax_down"][i, j, m], size["jax_up"][i, j, m] = _jax_sizes(
                    config.size, small, k, s, p, o
                )
    dims = ("kernel", "padding", "output_padding")
    return xr.Dataset(
        {name: (dims, values, {"units": "pixel"}) for name, values in size.items()}
        | {"solved": (dims, solved)},
        {"kernel": list(config.kernels), "padding": paddings, "output_padding": outputs},
        {"size": config.size, "stride": s},
    )


def figures(dataset: xr.Dataset) -> dict[str, Figure]:
    """A grid a kernel: size after the convolution → after the transposed one; fits marked."""
    kernels = dataset.kernel.values
    fig, axes = figure("wide", 1, len(kernels), height=2.9, squeeze=False, sharey=True)
    want, small = dataset.attrs["size"], dataset.attrs["size"] // dataset.attrs["stride"]
    for ax, k in zip(axes[0], kernels, strict=True):
        here = dataset.sel(kernel=k)
        for p in dataset.padding.values.tolist():
            for o in dataset.output_padding.values.tolist():
                cell = here.sel(padding=p, output_padding=o)
                fits = bool(cell.solved)
                ax.add_patch(
                    _square(o, p, COLOURS[5] if fits else "#f4f4f4", COLOURS[0] if fits else "w")
                )
                ax.text(
                    o,
                    p,
                    f"{want}→{int(cell.down)}\n{small}→{int(cell.up)}",
                    ha="center",
                    va="center",
                    fontsize=7.5,
                    weight="bold" if fits else "normal",
                    color="#222222" if fits else "#777777",
                )
        ax.set_title(f"kernel {k}", fontsize=10)
        ax.set_xlim(-0.5, dataset.output_padding.size - 0.5)
        ax.set_ylim(dataset.padding.size - 0.5, -0.5)
        ax.set_xticks(dataset.output_padding.values)
        ax.set_yticks(dataset.padding.values)
        ax.set_xlabel("output padding (pixels)")
        ax.grid(False)
    axes[0, 0].set_ylabel("padding (pixels)")
    caption(
        fig,
        f"The paddings that take {want} to {small} and back (blue). Sizes in and out of a "
        f"stride-{dataset.attrs['stride']} convolution (upper line) and of its transpose (lower "
        "line).",
    )
    return {"sizes": fig}


def _square(x: float, y: float, face: str, edge: str) -> Rectangle:
    return Rectangle((x - 0.47, y - 0.47), 0.94, 0.94, facecolor=face, edgecolor=edge, linewidth=1)


def claims(dataset: xr.Dataset) -> list[Claim]:
    """padding/kernel-4 and padding/kernel-5, by the solver and by XLA's own shapes."""
    size, stride = dataset.attrs["size"], dataset.attrs["stride"]
    small = size // stride
    found = []
    for k, expected in SOURCE.items():
        # The source speaks of 32 → 16 → 32 only.
        if k not in dataset.kernel.values or (size, stride) != (32, 2):
            continue
        here = dataset.sel(kernel=k)
        by_jax = (here.jax_down == small) & (here.jax_up == size)
        ours, theirs = _pairs(here.solved), _pairs(by_jax)
        found.append(
            Claim(
                id=f"padding/kernel-{k}",
                statement=f"Kernel {k}, stride {stride}, {size} → {small} → {size} wants padding "
                f"{expected[0]} and output padding {expected[1]}.",
                source={"padding": expected[0], "output padding": expected[1]},
                measured={
                    "solutions (padding, output padding)": [list(p) for p in ours],
                    "solutions by the shapes of XLA's convolutions": [list(p) for p in theirs],
                    "paddings tried": f"0 to {int(dataset.padding.max())}",
                },
                tolerance="exact, and no other solution",
                n_runs=by_jax.size,
                interval=None,
                verdict=verdict(ours == theirs == [expected]),
                evidence="padding/sizes",
                plain_words=f"The padding for {size} → {small} → {size} with kernel {k}",
                source_short=_said([expected]),
                measured_short=f"{len(ours)} of {by_jax.size} tried: {_said(ours)}",
            )
        )
    return found


def _said(pairs: list[tuple[int, int]]) -> str:
    return "; ".join(f"padding {p}, output padding {o}" for p, o in pairs) or "none"


def _pairs(mask: xr.DataArray) -> list[tuple[int, int]]:
    p, o = np.nonzero(mask.transpose("padding", "output_padding").values)
    return list(
        zip(mask.padding.values[p].tolist(), mask.output_padding.values[o].tolist(), strict=True)
    )
