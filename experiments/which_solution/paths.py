"""The paths of every optimiser in the plane and in space, to the solutions that they reach."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from optjax.experiments.which_solution.contenders import CONTENDERS, scales
from optjax.report.style import COLOURS, INK, MARKERS, WIDTHS, caption
from optjax.run.problems import least_squares
from optjax.run.trajectory import make_run
from optjax.theory.least_norms import least_norm_solution

X = {
    "plane": np.array([[2.0, 1.0, 0.0], [0.0, 0.0, 0.0]]),
    "space": np.array([[-1.0, -1.0, 1.0], [1.0, -2.0, 1.0]]),
}
"""Equations of the two pictures; in the plane, 2w₁ + w₂ = 2 alone."""
T = {"plane": np.array([2.0, 0.0]), "space": np.array([1.0, -0.5])}
STEPS = 1000
GENTLE = {
    "sgd": 0.3,
    "momentum": 0.02,
    "steepest_l1": 0.3,
    "mirror_descent": 0.03,
}
"""Parts of the usual learning rates, for paths without jumps; of the others a tenth."""
DRAWN = ("sgd", "momentum", "shampoo", "rmsprop", "adam", "adagrad", "sign_sgd", "lion",
         "steepest_l1", "mirror_descent")  # fmt: skip


def found(progress: Callable[[str, float], None]) -> xr.Dataset:
    """Paths from 0, at steps that grow."""
    kept = np.unique(np.r_[0, np.geomspace(1, STEPS, 120).round().astype(int)])
    paths = np.empty((len(X), len(DRAWN), len(kept), 3))
    for i, name in enumerate(DRAWN):
        progress(f"path of {name}", i / len(DRAWN))
        contender = CONTENDERS[name]
        for j, picture in enumerate(X):
            x, t = X[picture], T[picture]
            run = make_run(
                least_squares(x, t, scale=0.5), contender.factory, STEPS, sampler="full",
                record_path=True,
            )  # fmt: skip
            rate = GENTLE.get(name, 0.1) * contender.rate(scales(x, t, STEPS))
            paths[j, i] = run({"learning_rate": rate}, jax.random.key(0)).path[kept]
    return xr.Dataset(
        {"path": (("picture", "path_optimizer", "path_step", "coordinate"), paths)},
        {"picture": list(X), "path_optimizer": list(DRAWN), "path_step": kept},
    )


def drawn(dataset: xr.Dataset) -> Figure:
    """Draw the solutions, the row space, and every path, in the plane and in space."""
    fig = Figure(figsize=(WIDTHS["wide"], 4.6), layout="constrained")
    plane = fig.add_subplot(1, 2, 1)
    space = fig.add_subplot(1, 2, 2, projection="3d")
    _plane(plane, dataset.path.sel(picture="plane"))
    _space(space, dataset.path.sel(picture="space"))
    handles, labels = plane.get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside lower center", ncols=6, frameon=False, fontsize=8)
    return caption(
        fig, "Every point of the black line solves the equations. From 0, SGD, momentum and "
        "Shampoo keep to the row space (green) and end at the nearest solution, w*; the others "
        "leave it and end elsewhere, each where its own geometry leads.",
    )  # fmt: skip


def _look(i: int) -> dict[str, Any]:
    return {"color": COLOURS[i % 7], "ls": "-" if i < 7 else (0, (4, 1.5)), "lw": 1.4}


def _end(i: int) -> dict[str, Any]:
    look = {"marker": MARKERS[i % 8], "ls": "", "ms": 6, "mec": INK, "mew": 0.6, "zorder": 5}
    return look | {"color": COLOURS[i % 7]}


def _plane(ax: Axes, path: xr.DataArray) -> None:
    w1 = np.array([-0.05, 1.15])
    ax.plot(w1, 2 - 2 * w1, color="#000000", lw=2.2, label="solutions")
    ax.plot([-0.1, 1.1], [-0.05, 0.55], color=COLOURS[2], lw=7, alpha=0.3, label="row space")
    for i, name in enumerate(path.path_optimizer.values):
        line = path.sel(path_optimizer=name).values[:, :2]
        ax.plot(*line.T, **_look(i))
        ax.plot(*line[-1:].T, label=name, **_end(i))
    ax.plot(0.8, 0.4, "*", color="#ffffff", ms=15, mec=INK, zorder=6)
    ends = {"w*: least ℓ2 norm": (0.8, 0.4), "least ℓ1": (1.0, 0.0), "least ℓ∞": (2 / 3, 2 / 3)}
    for text, at in ends.items():
        below = -13 if text.startswith("w*") else 5
        ax.annotate(text, at, (9, below), textcoords="offset points", fontsize=9)
    ax.set(xlabel="w₁", ylabel="w₂", xlim=(-0.05, 1.35), ylim=(-0.05, 1.0), aspect="equal")
    ax.set_title("two weights, one equation", fontsize=10)
    ax.spines[["top", "right"]].set_visible(False)


def _space(ax: Any, path: xr.DataArray) -> None:
    x, t = X["space"], T["space"]
    star = least_norm_solution(x, t)
    rows = np.linalg.qr(x.T)[0].T
    along = np.cross(*rows)
    along *= np.sign(along[2])
    line = star + np.array([[-0.5], [0.75]]) * along
    u = star / np.linalg.norm(star)
    v = np.cross(along, u)
    corners = np.array([[-0.15, -0.3], [1.0, -0.3], [1.0, 0.3], [-0.15, 0.3]]) @ np.stack([u, v])
    ax.plot_trisurf(*corners.T, triangles=[[0, 1, 2], [0, 2, 3]], color=COLOURS[2], alpha=0.25,
                    shade=False)  # fmt: skip
    ax.plot(*line.T, color="#000000", lw=2.2)
    for i, name in enumerate(path.path_optimizer.values):
        each = path.sel(path_optimizer=name).values
        ax.plot(*each.T, **_look(i))
        ax.plot(*each[-1:].T, **_end(i))
    ax.plot(*star[:, None], "*", color="#ffffff", ms=15, mec=INK, zorder=6)
    ax.text(*(star + 0.12 * u - 0.02 * along), "w*", fontsize=10)
    ax.set(xlabel="w₁", ylabel="w₂", zlabel="w₃")
    ax.set_title("three weights, two equations", fontsize=10)
    ax.tick_params(labelsize=7)
    # From the side of the line, a little above the plane.
    eye = v + 0.35 * along - 0.25 * u
    ax.view_init(np.degrees(np.arcsin(eye[2] / np.linalg.norm(eye))),
                 np.degrees(np.arctan2(eye[1], eye[0])))  # fmt: skip
    ax.set_aspect("equal")
    ax.set_box_aspect(None, zoom=0.88)
