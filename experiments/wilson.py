"""Do adaptive methods label every new point + on the data of Wilson et al., and SGD rightly?"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import jax
import numpy as np
import optax
import xarray as xr
from matplotlib.figure import Figure

from optjax.experiments.which_solution.contenders import (
    CONTENDERS,
    Contender,
    final_weights,
    scales,
)
from optjax.experiments.which_solution.data_sets import DataSet, wilson, wilson_margins
from optjax.experiments.which_solution.run import endpoints
from optjax.report.claims import Claim, verdict
from optjax.report.rendering import number
from optjax.report.style import COLOURS, MARKERS, caption, figure
from optjax.run.problems import least_squares
from optjax.run.trajectory import make_run
from optjax.support.console import silent
from optjax.support.errors import UserError
from optjax.sweeps import sweep

EXACT = {
    "sgd": CONTENDERS["sgd"],
    "adagrad, accumulator 0": Contender(
        functools.partial(optax.adagrad, initial_accumulator_value=0.0, eps=1e-30),
        CONTENDERS["adagrad"].rate,
    ),
    "rmsprop": CONTENDERS["rmsprop"],
    "adam": CONTENDERS["adam"],
    "sign_sgd": CONTENDERS["sign_sgd"],
    "lion": CONTENDERS["lion"],
}
GENTLE = 0.1
"""Part of the usual learning rate for adaptive methods: at larger ones rounding errors off the
direction sign(Xᵀy) grow, as their steps are too long for its curvature there."""
ADAPTIVE = [name for name in EXACT if name != "sgd"]
ACCUMULATORS = (0.0, *np.geomspace(1e-8, 10.0, 28).tolist())
DEFAULT = 0.1
"""Optax's accumulator at the start."""


@dataclass(frozen=True)
class Config:
    """What do SGD and adaptive methods predict, where one feature is the label?

    x₁ = y, x₂ = x₃ = 1, and features that no other point has. X sign(Xᵀy) = 4y, so a method whose
    steps are ∝ sign(Xᵀy) ends at sign(Xᵀy)/4, where x₂ and x₃ outvote x₁.

    Command: optjax run wilson. Cost: 5 s on two cores.
    Expect: adaptive methods label all new points +; SGD's margins by the formula, no error; AdaGrad
    with optax's own accumulator of 0.1 does not follow the theory, and predicts well.
    """

    plus: tuple[int, ...] = (2, 3, 6, 9, 14)
    """n₊ of each data set, more than its n₋."""
    minus: tuple[int, ...] = (1, 2, 4, 3, 10)
    """n₋ of each."""
    tested: int = 200
    """New points, half of them −."""
    steps: int = 3000
    """Steps a run."""


def run(config: Config, progress: Callable[[str, float], None] = silent) -> xr.Dataset:
    """Cosine with sign(Xᵀy), margins and test errors; AdaGrad's by its accumulator."""
    counts = list(zip(config.plus, config.minus, strict=False))
    if len(config.plus) != len(config.minus) or any(p <= m or m < 1 for p, m in counts):
        raise UserError(
            f"plus is {config.plus} and minus {config.minus}: expected pairs n₊ > n₋ ≥ 1"
        )
    sets = [wilson(plus, minus, 2 * (config.tested // 2)) for plus, minus in counts]
    with jax.enable_x64(True):
        rows = []
        for i, (name, contender) in enumerate(EXACT.items()):

            def said(text: str, f: float, i: int = i, name: str = name) -> None:
                progress(f"{name}: {text}", (i + f) / (len(EXACT) + 1))

            part = 1.0 if name == "sgd" else GENTLE
            ends = endpoints(contender, sets, config.steps, (part,), said)
            rows.append([_judged(s, each[0]) for s, each in zip(sets, ends, strict=True)])
        found = xr.Dataset(
            {
                key: (("optimizer", "data"), [[row[key] for row in each] for each in rows])
                for key in rows[0][0]
            },
            {"optimizer": list(EXACT), "data": [f"{plus}, {minus}" for plus, minus in counts]},
        )
        formula = np.array([wilson_margins(*count) for count in counts])
        return found.assign(
            formula_plus=("data", formula[:, 0]), formula_minus=("data", formula[:, 1])
        ).merge(_by_accumulator(sets[len(sets) // 2], config.steps))


def _judged(s: DataSet, w: np.ndarray) -> dict[str, float]:
    goal = np.sign(s.X.T @ s.t)
    margins = s.X_test @ w
    return {
        "cosine": float(goal @ w / np.linalg.norm(goal) / np.linalg.norm(w)),
        "plus": float(margins[s.t_test > 0].mean()),
        "minus": float(margins[s.t_test < 0].mean()),
        "test_error": s.error(w),
        "labelled_plus": float(np.mean(margins > 0)),
        "residual": float(np.linalg.norm(s.X @ w - s.t) / np.linalg.norm(s.t)),
    }


def _by_accumulator(s: DataSet, steps: int) -> xr.Dataset:
    """AdaGrad's ends by the accumulator at the start."""

    def factory(learning_rate, initial_accumulator_value):
        return optax.adagrad(learning_rate, initial_accumulator_value, eps=1e-30)

    run = make_run(least_squares(s.X, s.t, scale=0.5), factory, steps, sampler="full",
                   record_every=steps)  # fmt: skip
    rate = GENTLE * CONTENDERS["adagrad"].rate(scales(s.X, s.t, steps))
    runs = sweep(
        run,
        {"initial_accumulator_value": list(ACCUMULATORS), "learning_rate": rate},
        final=final_weights,
    )
    each = [_judged(s, w) for w in runs.weights.values.reshape(len(ACCUMULATORS), -1)]
    return xr.Dataset(
        {
            f"adagrad_{key}": ("accumulator", [row[key] for row in each])
            for key in ("cosine", "minus", "plus", "test_error", "residual")
        },
        {"accumulator": list(ACCUMULATORS)},
    )


def figures(dataset: xr.Dataset) -> dict[str, Figure]:
    """Margins of new points by optimiser; AdaGrad's by its accumulator."""
    fig, (left, right) = figure("wide", 1, 2, height=3.2)
    names = dataset.optimizer.values.tolist()
    middle = dataset.isel(data=dataset.sizes["data"] // 2)
    for sign, colour, key in (("+", COLOURS[0], "plus"), ("−", COLOURS[1], "minus")):
        left.plot(middle[key], range(len(names)), MARKERS[key == "minus"], color=colour, ms=7,
                  mec="#222222", label=f"new points {sign}")  # fmt: skip
        left.axvline(float(middle[f"formula_{key}"]), color=colour, ls="--", lw=1)
    left.axvline(0, color="#222222", lw=1)
    left.axvspan(0, 1.05, color="#000000", alpha=0.06, lw=0)
    left.text(0.36, len(names) - 0.5, "labelled +", fontsize=8, color="#555555")
    left.set_yticks(range(len(names)), names)
    left.set(ylim=(len(names) - 0.4, -0.6), xlabel="xᵀw of a new point", xlim=(-0.85, 1.05))
    n_plus, n_minus = str(middle.data.values).split(", ")
    left.set_title(f"n₊ = {n_plus}, n₋ = {n_minus}; dashed: the formula of w*")
    left.legend(frameon=False, fontsize=8, loc="lower left")

    x = np.maximum(dataset.accumulator.values, 1e-9)
    right.semilogx(x, dataset.adagrad_minus, color=COLOURS[1], label="new points −")
    right.semilogx(x, dataset.adagrad_plus, color=COLOURS[0], label="new points +")
    right.semilogx(x, dataset.adagrad_cosine, color=COLOURS[6], ls=":",
                   label="cosine with sign(Xᵀy)")  # fmt: skip
    right.axhline(0, color="#222222", lw=1)
    right.axvline(DEFAULT, color="#777777", ls="--", lw=1)
    right.text(DEFAULT * 0.8, -0.42, "optax's default", fontsize=8, ha="right", color="#555555")
    right.set(
        xlabel="AdaGrad's accumulator at the start (leftmost: 0)", ylabel="xᵀw of a new point"
    )
    right.set_title("AdaGrad by its accumulator")
    right.legend(frameon=False, fontsize=8)
    caption(fig, "Adaptive methods label every new point + (both dots right of 0), SGD none "
            "wrongly. The larger AdaGrad's accumulator, the more its steps are SGD's: with optax's "
            "default it is no longer the method of the theory.")  # fmt: skip
    return {"margins": fig}


def claims(dataset: xr.Dataset) -> list[Claim]:
    """implicit-bias/wilson."""
    ours, sgd = dataset.sel(optimizer=ADAPTIVE), dataset.sel(optimizer="sgd")
    cosine = float(ours.cosine.min(skipna=False))
    residual = float(dataset.residual.max(skipna=False))
    margins = [abs(sgd[name] - sgd[f"formula_{name}"]) for name in ("plus", "minus")]
    off = float(np.max(margins))
    wrong = float(abs(ours.test_error - 0.5).max(skipna=False))
    labelled = float(ours.labelled_plus.min(skipna=False))
    default = dataset.sel(accumulator=DEFAULT, method="nearest")
    return [
        Claim(
            id="implicit-bias/wilson",
            statement="Where one feature is the label and two are constant, adaptive methods end "
            "at sign(Xᵀy)/4 and label every new point +; SGD ends at w* and labels all rightly.",
            source="beyond the source",
            measured={
                "smallest cosine of an adaptive method with sign(Xᵀy)": cosine,
                "largest deviation of SGD's margins from the formula": off,
                "largest test error of SGD": float(sgd.test_error.max()),
                "test error of every adaptive method": float(ours.test_error.mean()),
                "share of new points that they label +": labelled,
                "largest relative residual": residual,
                "n₊, n₋": dataset.data.values.tolist(),
                "AdaGrad with an accumulator of 0.1: cosine": float(default.adagrad_cosine),
                "the same: test error": float(default.adagrad_test_error),
            },
            tolerance="cosine above 0.9999, solved to 1e-6; margins to 1e-10; errors 0 and the "
            "share of −, 0.5",
            n_runs=dataset.residual.size + dataset.sizes["accumulator"],
            interval=None,
            verdict=verdict(
                cosine > 0.9999
                and residual < 1e-6
                and labelled == 1
                and wrong == 0
                and off < 1e-10
                and not sgd.test_error.any()
            ),
            evidence="wilson/margins",
            plain_words="Adaptive methods label every new point +, SGD none wrongly (Wilson 2017)",
            source_short="beyond the source",
            measured_short=f"cosine ≥ {cosine:.6f}; SGD's margins to {number(off, 2)}",
        )
    ]
