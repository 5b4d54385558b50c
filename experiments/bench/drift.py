"""How far runs in float32 drift from the same runs, with the same draws, in float64.

Command: python -m optjax.experiments.bench.drift
It writes results/drift.svg: the relative difference of the training loss at every record, beside
how much the loss differs from seed to seed.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

import optjax as oj
from optjax.colourisation import networks
from optjax.colourisation.problem import colourisation_problem
from optjax.experiments.batch_problems import WholeLoss, drawn_tiles, spread_squares
from optjax.report.style import COLOURS, MARKERS, caption, figure, save
from optjax.run.problems import Data
from optjax.support.types import PyTree

SEEDS, STEPS, NET_STEPS = 8, 200_000, 1000


@dataclasses.dataclass(frozen=True)
class _From32:
    """The start that a problem has in float32, in the type of its data."""

    init: Callable[[Any, Data], tuple[PyTree, PyTree]]

    def __call__(self, key: Any, data: Data) -> tuple[PyTree, PyTree]:
        def cast(tree: PyTree, dtype: Any) -> PyTree:
            return jax.tree.map(lambda a: a.astype(dtype) if a.dtype.kind == "f" else a, tree)

        return cast(self.init(key, cast(data, np.float32)), data.examples["inputs"].dtype)


def cases() -> dict[str, Any]:
    """Name → a function of a dtype that makes the run."""
    squares = spread_squares(256, 32, 0)

    def on_squares(optimizer: Any, dtype: Any) -> oj.Run:
        problem = oj.least_squares(squares.X.astype(dtype), squares.t.astype(dtype))
        return oj.make_run(problem, optimizer, STEPS, max_batch_size=8, record_every=STEPS // 200)

    def on_a_net(dtype: Any) -> oj.Run:
        grey, labels = drawn_tiles(None, 128, 0, (16,), size=16, colours=8)
        net = networks.model("conv-transpose", filters=8, colours=8)
        problem = colourisation_problem(net, (grey.astype(dtype), labels))
        start = _From32(problem.init)  # draws of float64 are others
        problem = dataclasses.replace(problem, init=start, metrics=WholeLoss(problem.loss))
        return oj.make_run(problem, optax.sgd, NET_STEPS, max_batch_size=16, record_every=5)

    def sgd(learning_rate: Any) -> optax.GradientTransformation:
        return optax.sgd(learning_rate, momentum=0.9)

    return {
        "least squares, SGD": (lambda dtype: on_squares(optax.sgd, dtype), 0.02),
        "least squares, momentum": (lambda dtype: on_squares(sgd, dtype), 0.002),
        "least squares, Adam": (lambda dtype: on_squares(optax.adam, dtype), 0.001),
        "network, SGD": (on_a_net, 0.3),
    }


def main() -> None:
    jax.config.update("jax_enable_x64", True)  # of float32 data the runs are float32's
    fig, ax = figure("wide")
    for i, (name, (make, rate)) in enumerate(cases().items()):
        single, double = (
            oj.sweep(make(dtype), {"learning_rate": rate}, SEEDS, progress=lambda *_: None)
            for dtype in (np.float32, np.float64)
        )
        metric = "whole_loss" if "whole_loss" in double else "loss"
        theirs = double[metric].values.reshape(SEEDS, -1)
        drift = np.abs(single[metric].values.reshape(SEEDS, -1).astype(float) - theirs) / theirs
        spread = theirs.std(0, ddof=1) / theirs.mean(0)
        steps = double.step.values
        ax.plot(steps, np.median(drift, 0), color=COLOURS[i], marker=MARKERS[i], markevery=0.2,
                label=name)  # fmt: skip
        ax.fill_between(
            steps, *np.quantile(drift, [0, 1], axis=0), color=COLOURS[i], alpha=0.2, lw=0
        )
        ax.plot(steps, spread, color=COLOURS[i], ls=":")
        end = drift[:, -drift.shape[1] // 10 :]
        print(
            f"{name}: {steps[-1]:,} steps: drift of the loss at the end {np.median(end):.1e}, at "
            f"most {end.max():.1e}; from seed to seed {np.median(spread[-20:]):.1e}"
        )
    ax.set(xscale="log", yscale="log", xlabel="step", ylabel="relative difference of the loss")
    ax.legend(fontsize=8)
    text = "float32 and float64, same draws: median and range over seeds. Dotted: seed to seed."
    Path("results").mkdir(exist_ok=True)
    save(caption(fig, text), Path("results/drift"))


if __name__ == "__main__":
    main()
