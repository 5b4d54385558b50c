"""What the table of solutions says of each family of optimisers."""

import numpy as np
import xarray as xr

from optjax.experiments.which_solution.figures import SOLVED
from optjax.report.claims import Claim, verdict
from optjax.report.rendering import number

KEEPERS = ("sgd", "momentum", "nesterov", "shampoo")
"""Optimisers whose steps from 0 keep to the row space, of weights that are a vector."""


def claims(dataset: xr.Dataset) -> list[Claim]:
    """implicit-bias/row-space and implicit-bias/prediction."""
    vectors = dataset.isel(data=[not k.startswith("a matrix") for k in dataset.data.values])
    vectors = vectors.sel(optimizer=[o for o in vectors.optimizer.values if o != "muon"])
    far = vectors.distance.sel(solution="least ℓ2").where(vectors.residual <= SOLVED)
    ours = [o for o in vectors.optimizer.values if o in KEEPERS]
    others = [o for o in vectors.optimizer.values if o not in KEEPERS]
    keep = float(far.sel(optimizer=ours).max())
    all_solve = bool((vectors.residual.sel(optimizer=ours) <= SOLVED).all())
    leave = far.sel(optimizer=others).max("data")
    sparse = dataset.sel(data="sparse weights").where(
        dataset.residual.sel(data="sparse weights") <= SOLVED
    )
    best = sparse.test_error.fillna(np.inf)
    winner = str(best.optimizer.values[np.argmin(best.values)])
    even = dataset.sel(data="even spectrum").test_error.where(
        dataset.residual.sel(data="even spectrum") <= SOLVED
    )
    return [
        Claim(
            id="implicit-bias/row-space",
            statement="From 0, SGD, momentum, Nesterov's method and Shampoo on a vector end at "
            "the minimum-norm solution of every data set; every other one ends elsewhere on some.",
            source="beyond the source",
            measured={
                "largest relative distance to w* of those": keep,
                **{f"{o}: largest distance to w*": float(leave.sel(optimizer=o)) for o in others},
            },
            tolerance=f"{SOLVED:g}; the others above 1e-3",
            n_runs=int(np.isfinite(vectors.residual).sum()) * 3,
            interval=None,
            verdict=verdict(all_solve and keep < SOLVED and bool((leave > 1e-3).all())),
            evidence="which_solution/table",
            plain_words="Steps in the row space end at w*; every other optimiser leaves it",
            source_short="beyond the source",
            measured_short=f"≤ {number(keep, 2)} from w*; each other somewhere "
            f"≥ {number(float(leave.min()), 2)}",
        ),
        Claim(
            id="implicit-bias/prediction",
            statement="A bias predicts well where the truth shares it: on weights of which 3 in 32 "
            "are not 0, greedy coordinate descent finds them and SGD does not; on dense ones not.",
            source="beyond the source",
            measured={
                "best on sparse weights": winner,
                **{
                    f"{o}: test error, sparse and dense": [
                        float(sparse.test_error.sel(optimizer=o)), float(even.sel(optimizer=o)),
                    ]
                    for o in sparse.optimizer.values if o != "muon"
                },
            },
            tolerance="sparse: steepest_l1 below 1e-6, sgd above 0.1; dense: sgd below steepest_l1",
            n_runs=2 * 3 * (dataset.sizes["optimizer"] - 1),
            interval=None,
            verdict=verdict(
                {"sgd", "steepest_l1"} <= set(dataset.optimizer.values.tolist())
                and float(sparse.test_error.sel(optimizer="steepest_l1")) < 1e-6
                and float(sparse.test_error.sel(optimizer="sgd")) > 0.1
                and float(even.sel(optimizer="sgd")) < float(even.sel(optimizer="steepest_l1"))
            ),
            evidence="which_solution/errors",
            plain_words="The optimiser that predicts best is the one whose bias the truth shares",
            source_short="beyond the source",
            measured_short=f"sparse: {winner} {number(float(best.min()), 2)}, "
            f"sgd {number(float(best.sel(optimizer='sgd')), 2)}",
        ),
    ]  # fmt: skip
