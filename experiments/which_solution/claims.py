"""What the table of solutions says of each family of optimisers."""

import numpy as np
import xarray as xr

from optjax.experiments.which_solution.contenders import FACTORS, SOLVED
from optjax.report.claims import Claim, verdict
from optjax.report.rendering import number

KEEPERS = ("sgd", "momentum", "nesterov", "shampoo")
"""Optimisers whose steps from 0 keep to the row space, of weights that are a vector."""


NEEDS = "the optimizers {}; leave --optimizers out"


def claims(dataset: xr.Dataset) -> list[Claim]:
    """implicit-bias/row-space and implicit-bias/prediction."""
    names = dataset.optimizer.values.tolist()
    dataset = dataset.reindex(optimizer=list(dict.fromkeys([*names, *KEEPERS, "steepest_l1"])))
    others = [o for o in names if o not in (*KEEPERS, "muon")]
    solved = dataset.residual <= SOLVED
    vectors = [k for k in dataset.data.values if not k.startswith("a matrix")]
    far = dataset.distance.sel(solution="least ℓ2", data=vectors).where(solved)
    # NaN where one of them solved nothing, or was left out.
    keep = float(far.sel(optimizer=list(KEEPERS)).max(skipna=False))
    leave = far.sel(optimizer=others).max("data")
    least = float(np.min(leave.values, initial=np.inf))
    error = dataset.test_error.where(solved)
    sparse, dense = error.sel(data="sparse weights"), error.sel(data="even spectrum")
    winner = str(dataset.optimizer.values[np.argmin(sparse.fillna(np.inf).values)])
    sgd, coordinate = (
        [float(kind.sel(optimizer=o)) for kind in (sparse, dense)] for o in ("sgd", "steepest_l1")
    )
    ran = int(dataset.residual.notnull().sum()) * len(FACTORS)
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
            n_runs=ran,
            interval=None,
            verdict="not run"
            if not others or not set(KEEPERS) <= set(names)
            else verdict(keep < SOLVED and least > 1e-3),
            evidence="which_solution/table",
            plain_words="Steps in the row space end at w*; every other optimiser leaves it",
            source_short="beyond the source",
            measured_short=f"≤ {number(keep, 2)} from w*; each other somewhere "
            f"≥ {number(least, 2)}",
            needs=NEEDS.format(f"{', '.join(KEEPERS)} and one more"),
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
                        float(sparse.sel(optimizer=o)), float(dense.sel(optimizer=o)),
                    ]
                    for o in names if o != "muon"
                },
            },
            tolerance="sparse: steepest_l1 below 1e-6, sgd above 0.1; dense: sgd below steepest_l1",
            n_runs=ran,
            interval=None,
            verdict="not run"
            if not {"sgd", "steepest_l1"} <= set(names)
            else verdict(coordinate[0] < 1e-6 and sgd[0] > 0.1 and sgd[1] < coordinate[1]),
            evidence="which_solution/errors",
            plain_words="The optimiser that predicts best is the one whose bias the truth shares",
            source_short="beyond the source",
            measured_short=f"sparse: {winner} {number(float(sparse.min()), 2)}, "
            f"sgd {number(sgd[0], 2)}",
            needs=NEEDS.format("sgd and steepest_l1"),
        ),
    ]  # fmt: skip
