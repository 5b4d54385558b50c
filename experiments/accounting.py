"""How many weights, outputs and connections do the three networks have, and what do they see?"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import skimage.data
import sympy
import xarray as xr
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from optjax.accounting.account import Accounting, account
from optjax.accounting.operations import symbol
from optjax.accounting.polynomials import text
from optjax.accounting.receptive_fields import measured_field, receptive_fields
from optjax.colourisation.networks import MODELS
from optjax.colourisation.pictures import shrink
from optjax.report.claims import Claim, verdict
from optjax.report.style import COLOURS, MARKERS, caption, figure, pictures
from optjax.support.console import silent
from optjax.support.errors import UserError

NIC, NF, NC = symbol("NIC"), symbol("NF"), symbol("NC")
SOURCE = {
    "weights": (32, "weights", 9 * NIC * NF + 36 * NF**2 + 9 * NF * NC + 9 * NC**2),
    "weights-64": (64, "weights", 9 * NIC * NF + 36 * NF**2 + 9 * NF * NC + 9 * NC**2),
    "outputs-32": (32, "outputs", 2240 * NF + 2304 * NC),
    "connections-32": (
        32,
        "connections",
        9216 * NIC * NF + 5760 * NF**2 + 1792 * NF + 2304 * NF * NC + 1024 * NC + 9216 * NC**2,
    ),
    "outputs-64": (64, "outputs", 8960 * NF + 9216 * NC),
    "connections-64": (
        64,
        "connections",
        36864 * NIC * NF + 23040 * NF**2 + 7168 * NF + 9216 * NF * NC + 4096 * NC + 36864 * NC**2,
    ),
}
"""claim -> (side of the picture, what is counted of PoolUpsampleNet, the source's polynomial)."""

COUNTS = ("weights", "outputs", "connections", "multiply_adds", "training_flops")
PICTURE, MIDDLE, THIN = 64, 32, 4
"""Side of the picture that receptive fields are drawn on, the output they are of, and the width of
the networks whose gradients measure them (what is seen does not depend on it)."""


@dataclass(frozen=True)
class Config:
    """How many weights, outputs and connections do the networks have, in symbols and in numbers?

    Command: optjax run accounting. Cost: 15 s on two cores; --full 20 s.
    Expect: the source's six polynomials; 13.3, 9.5 and 11.5 million multiply-adds a picture; equal
    parameters of PoolUpsampleNet and ConvTransposeNet at every width.
    """

    points: int = 6
    """Random sizes and widths at which polynomials meet counts in numbers."""
    filters: int = 32
    """NF of the counts in numbers."""
    colours: int = 24
    """NC of the counts in numbers."""
    sides: tuple[int, ...] = (16, 32, 64)
    """Sides of the picture for the scaling figure; multiples of 4."""
    widths: tuple[int, ...] = (4, 8, 16, 32)
    """NF for the scaling figure."""
    seed: int = 0
    """Of the random points and of the measured receptive fields."""


FULL = {
    "points": 12,
    "sides": (16, 32, 64, 128, 256),
    "widths": (4, 8, 16, 32, 64, 128),
}
"""The sizes of RESULTS.md."""


def run(config: Config, progress: Callable[[str, float], None] = silent) -> xr.Dataset:
    """Accounts of the three networks in symbols and numbers, and their receptive fields."""
    for name in ("points", "filters", "colours"):
        if getattr(config, name) < 1:
            raise UserError(f"{name} is {getattr(config, name)}: expected at least 1")
    for side in config.sides:
        if side < 4 or side % 4:
            raise UserError(f"sides holds {side}: expected multiples of 4, the networks' strides")
    if not config.sides or not config.widths or min(config.widths) < 1:
        raise UserError("sides and widths: expected at least one each, and widths above 0")
    nets = list(MODELS)
    progress("accounts in symbols", 0.0)
    symbolic = {
        name: account(net, ("H", "W", "NIC"), filters="NF", colours="NC")
        for name, net in MODELS.items()
    }
    pool = symbolic["pool-upsample"]
    measured = {
        claim: pool.at(H=side, W=side).total(column) for claim, (side, column, _) in SOURCE.items()
    }
    same = [sympy.expand(measured[claim] - SOURCE[claim][2]) == 0 for claim in SOURCE]
    progress("accounts in numbers", 0.2)
    agree = _at_random_points(symbolic, config, lambda f: progress("random sizes", 0.2 + 0.4 * f))
    fixed = {"NIC": 1, "NC": config.colours}

    def along(points: list[dict[str, int]]) -> np.ndarray:
        """Every count of every net at those sizes and widths."""
        functions = [[symbolic[net].function(column) for column in COUNTS] for net in nets]
        found = [[[f(**fixed, **put) for put in points] for f in row] for row in functions]
        return np.array(found, float)

    by_side = along([{"H": side, "W": side, "NF": config.filters} for side in config.sides])
    by_width = along([{"H": 32, "W": 32, "NF": width} for width in config.widths])
    here = {"H": 32, "W": 32, "NF": config.filters, **fixed}
    rows = _rows(config)
    progress("receptive fields", 0.6)
    fields, masks = _fields(config, lambda f: progress("receptive fields", 0.6 + 0.4 * f))
    difference = sympy.expand(
        symbolic["conv-transpose"].parameters - symbolic["pool-upsample"].parameters
    )
    photograph = shrink(skimage.data.chelsea(), 4)[:PICTURE, 24 : 24 + PICTURE]
    return xr.Dataset(
        {
            "polynomial": ("claim", [text(measured[claim]) for claim in SOURCE]),
            "polynomial_of_the_source": ("claim", [text(SOURCE[claim][2]) for claim in SOURCE]),
            "same": ("claim", same),
            "points_that_agree": (("net", "count"), agree),
            "by_side": (("net", "count", "side"), by_side),
            "by_width": (("net", "count", "width"), by_width),
            **{name: ("row", values) for name, values in rows.items()},
            **{f"field_{name}": ("field", values) for name, values in fields.items()},
            "seen": (("net", "y", "x"), masks),
            "picture": (("y", "x", "channel"), photograph),
            "parameters": ("net", [symbolic[n].at(**here).parameters for n in nets]),
            "parameters_in_symbols": ("net", [symbolic[n].text("parameters") for n in nets]),
        },
        coords={
            "claim": list(SOURCE),
            "net": nets,
            "count": list(COUNTS),
            "side": list(config.sides),
            "width": list(config.widths),
        },
        attrs={
            "points": config.points,
            "more_parameters": text(difference),
            # A polynomial of positive symbols, as far as its signs tell.
            "transpose_has_more": int(bool(difference.is_positive)),
        },
    )


def _at_random_points(
    symbolic: dict[str, Accounting], config: Config, progress: Callable[[float], None]
) -> list[list[int]]:
    """For each net and count, at how many random sizes numbers and polynomials agree."""
    rng = np.random.default_rng(config.seed)
    agree = [[0] * len(COUNTS) for _ in symbolic]
    for point in range(config.points):
        h, w = (4 * int(n) for n in rng.integers(1, 12, 2))
        nic, nf, nc = (int(n) for n in rng.integers(1, 9, 3))
        for i, (name, formula) in enumerate(symbolic.items()):
            numbers = account(MODELS[name](filters=nf, colours=nc), (h, w, nic))
            put = formula.at(H=h, W=w, NIC=nic, NF=nf, NC=nc)
            for j, column in enumerate(COUNTS):
                agree[i][j] += put.total(column) == numbers.total(column)
        progress((point + 1) / config.points)
    return agree


def _rows(config: Config) -> dict[str, list]:
    """The layers of the three networks at 32 × 32, one below the other."""
    rows = []
    for name, net in MODELS.items():
        found = account(net(filters=config.filters, colours=config.colours), (32, 32, 1))
        rows += [(name, row) for row in found.rows if row.kind != "elementwise"]
    columns = {"layer": "name", **{c: c for c in ("kind", "weights", "outputs", "connections")}}
    return {"layer_net": [name for name, _ in rows]} | {
        ours: [getattr(row, column) for _, row in rows] for ours, column in columns.items()
    }


def _fields(
    config: Config, progress: Callable[[float], None]
) -> tuple[dict[str, list], np.ndarray]:
    """What the middle of each layer sees of a picture, and what gradients say of the last."""
    out: dict[str, list] = {
        name: [] for name in ("net", "layer", "size", "stride", "top", "left", "bottom", "right")
    }
    masks = []
    for i, (name, net) in enumerate(MODELS.items()):
        thin = net(filters=THIN, colours=THIN)
        for field in receptive_fields(thin, (PICTURE, PICTURE, 1)):
            if field.kind == "elementwise":
                continue
            down, across = field.axes
            assert down is not None
            assert across is not None
            (top, bottom), (left, right) = (a.at(round(MIDDLE / a.stride)) for a in (down, across))
            values = (name, field.name, down.size, float(down.stride), top, left, bottom, right)
            for key, value in zip(out, values, strict=True):
                out[key].append(value)
        seen = measured_field(thin, (PICTURE, PICTURE, 1), (MIDDLE, MIDDLE), seed=config.seed)
        masks.append(seen)
        progress((i + 1) / len(MODELS))
    return out, np.array(masks)


# ------------------------------------------------------------------------------------- figures

_LABELS = {
    "weights": "weights",
    "outputs": "outputs",
    "connections": "connections",
    "training_flops": "FLOPs of a training step",
}


def figures(dataset: xr.Dataset) -> dict[str, Figure]:
    return {
        "layers": _layers(dataset),
        "scaling": _scaling(dataset),
        "receptive_fields": _receptive(dataset),
    }


def _layers(dataset: xr.Dataset) -> Figure:
    """Weights and connections of each stage, the three networks side by side."""
    fig, axes = figure("wide", 1, 2, height=3.1)
    nets = dataset["net"].values.tolist()
    stage = dict.fromkeys(nets, -1)
    sums = {name: np.zeros((len(nets), 5)) for name in ("weights", "connections")}
    columns = ("layer_net", "kind", "weights", "connections")
    for net, kind, w, c in zip(*(dataset[name].values for name in columns), strict=True):
        stage[net] += kind in ("conv", "transposed conv")
        sums["weights"][nets.index(net), stage[net]] += w
        sums["connections"][nets.index(net), stage[net]] += c
    for ax, name in zip(axes, sums, strict=True):
        for i, net in enumerate(nets):
            x = np.arange(5) + 0.27 * (i - 1)
            ax.bar(x, sums[name][i], width=0.25, color=COLOURS[i], label=net)
        ax.ticklabel_format(axis="y", style="sci", scilimits=(0, 3), useMathText=True)
        ax.set_xticks(range(5), [f"{n}" for n in range(1, 6)])
        ax.set(xlabel="stage", ylabel=f"{name} (count)")
        ax.grid(False, axis="x")
    axes[0].legend(fontsize=8, loc="upper right")
    return caption(
        fig,
        "PoolUpsampleNet and ConvTransposeNet have the same weights in every stage; they differ "
        "in where they compute. Pooling comes after a convolution at full size, a stride before "
        "one. Counts are of a 32 × 32 picture.",
    )


def _scaling(dataset: xr.Dataset) -> Figure:
    fig, axes = figure("wide", 2, len(_LABELS), height=4.6, sharey="col")
    for j, (column, title) in enumerate(_LABELS.items()):
        for i, (along, label) in enumerate((("side", "side (pixels)"), ("width", "NF (filters)"))):
            ax = axes[i, j]
            x = dataset[along].values
            for n, net in enumerate(dataset["net"].values.tolist()):
                y = dataset[f"by_{along}"].sel(net=net, count=column).values
                style = {"color": COLOURS[n], "marker": MARKERS[n], "markersize": 3, "lw": 1.2}
                ax.loglog(x, y, label=net, **style)
            ax.set_xticks(x, [str(v) for v in x], fontsize=7)
            ax.minorticks_off()
            ax.set_xlabel(label, fontsize=8)
            if i == 0:
                ax.set_title(title, fontsize=9)
        axes[0, j].tick_params(axis="y", labelsize=7)
        axes[1, j].tick_params(axis="y", labelsize=7)
    for ax in axes[:, 0]:
        ax.set_ylabel("count")
    axes[0, 0].legend(fontsize=7)
    return caption(
        fig,
        "Weights do not depend on the picture; all else grows with its area. Each count against "
        "the side of the picture (above; the default widths) and against the number of filters "
        "(below; 32 × 32 pixels), from the formulas; a training step is of 1 picture.",
    )


def _receptive(dataset: xr.Dataset) -> Figure:
    nets = dataset["net"].values.tolist()
    fig, (axes, keys) = figure("wide", 2, len(nets), height=4.5, height_ratios=(3.2, 1))
    grey = dataset["picture"].values.mean(-1)
    for ax, key, net in zip(axes, keys, nets, strict=True):
        pictures(ax).imshow(grey, cmap="gray", vmin=0, vmax=330)
        here = np.flatnonzero(dataset["field_net"].values == net)
        for turn, k in enumerate(here):
            top, left, bottom, right = (
                int(dataset[f"field_{edge}"][k]) for edge in ("top", "left", "bottom", "right")
            )
            size = (right - left + 1, bottom - top + 1)
            colour = COLOURS[turn % 6]
            label = f"{dataset['field_layer'].values[k]}: {int(dataset['field_size'][k])}"
            style = {"fill": False, "edgecolor": colour, "linewidth": 1.4, "label": label}
            dashes = "-" if turn < 6 else (0, (4, 2))
            ax.add_patch(Rectangle((left - 0.5, top - 0.5), *size, linestyle=dashes, **style))
        seen = dataset["seen"].sel(net=net).values
        ax.contourf(seen, levels=[0.5, 1.5], colors=[COLOURS[4]], alpha=0.25)
        ax.set_title(net, fontsize=10)
        pictures(key).legend(
            *ax.get_legend_handles_labels(), fontsize=7, loc="upper center", ncol=2
        )
    return caption(
        fig,
        "How much of a 64 × 64 picture the middle of each layer sees. Boxes: derived from the "
        "program; the side in pixels is that of the output that sees most. Orange: the pixels "
        "that the gradient of the network's middle output reaches.",
    )


# -------------------------------------------------------------------------------------- claims


def _first_terms(polynomial: str) -> str:
    """The whole polynomial where it is short, else its first two terms."""
    first, second, *others = polynomial.split(" + ")
    return polynomial if len(others) < 3 else f"{first} + {second} + {len(others)} terms"


def claims(dataset: xr.Dataset) -> list[Claim]:
    points = int(dataset.attrs["points"])
    pool = dataset.sel(net="pool-upsample")
    found = []
    for claim, (side, column, _) in SOURCE.items():
        here = dataset.sel(claim=claim)
        agree = int(pool["points_that_agree"].sel(count=column))
        found.append(
            Claim(
                id=f"accounting/{claim}",
                statement=f"{column.capitalize()} of PoolUpsampleNet at {side} × {side}.",
                source=str(here["polynomial_of_the_source"].values),
                measured={
                    column: str(here["polynomial"].values),
                    "random sizes and widths at which the number agrees": f"{agree} of {points}",
                },
                tolerance="exact, as polynomials",
                n_runs=points,
                interval=None,
                verdict=verdict(bool(here["same"]) and agree == points),
                evidence="accounting/scaling",
                plain_words=f"{column.capitalize()} of PoolUpsampleNet on a {side} × {side} "
                "picture",
                source_short=_first_terms(str(here["polynomial_of_the_source"].values)),
                measured_short="the same polynomial"
                if here["same"]
                else _first_terms(str(here["polynomial"].values)),
            )
        )
    pair = ("pool-upsample", "conv-transpose")
    count = {net: int(dataset["parameters"].sel(net=net)) for net in pair}
    found.append(
        Claim(
            id="colourisation/why-more-parameters",
            statement="ConvTransposeNet is better because it has more parameters.",
            source="more learnable parameters",
            measured={
                **{f"parameters of {net}": n for net, n in count.items()},
                "parameters of either, in symbols": str(
                    dataset["parameters_in_symbols"].sel(net="conv-transpose").values
                ),
                "difference, in symbols": dataset.attrs["more_parameters"],
            },
            tolerance="exact, at every width",
            n_runs=len(count),
            interval=None,
            verdict=verdict(int(dataset.attrs["transpose_has_more"])),
            evidence="accounting/layers",
            plain_words="ConvTransposeNet has more parameters, so it is better",
            measured_short=f"{count['pool-upsample']:,} and {count['conv-transpose']:,}; "
            f"difference {dataset.attrs['more_parameters']} at every width",
        )
    )
    return found
