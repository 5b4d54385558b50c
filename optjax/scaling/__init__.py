"""Scaling laws: evaluate the published ones, fit your own with intervals, allocate a budget.

    points, _ = read_runs("runs.csv")
    found = fit(drop_highest(points, 5), "hoffmann")
    intervals(bootstrap(found, 4000))
    allocate_hoffmann(found.law, 1e21)

Fits are in float64 whatever the precision of the process; the laws and allocations are plain
functions of JAX arrays that vmap, jit and grad.
"""

from optjax.scaling.allocate import (
    KAPLAN_FRONTIER,
    PF_DAY,
    Allocation,
    Check,
    Exponents,
    KaplanFrontier,
    allocate_frontier,
    allocate_hoffmann,
    allocate_kaplan,
    contradictions,
    hoffmann_exponents,
    kaplan_exponents,
)
from optjax.scaling.bootstrap import (
    Bootstrap,
    Interval,
    bootstrap,
    falling,
    interval,
    intervals,
    predictions,
)
from optjax.scaling.fit import Fit, drop_highest, fit, objective
from optjax.scaling.forms import FORMS
from optjax.scaling.laws import (
    BESIROGLU_2024,
    HOFFMANN_2022,
    KAPLAN_BATCH,
    KAPLAN_D,
    KAPLAN_N,
    KAPLAN_ND,
    KAPLAN_NS,
    Hoffmann,
    KaplanBatch,
    KaplanND,
    KaplanNS,
    Power,
    critical_batch,
    hoffmann_loss,
    kaplan_nd_loss,
    kaplan_ns_loss,
    least_steps,
    power_loss,
    training_flops,
)
from optjax.scaling.sensitivity import (
    Extrapolation,
    Sensitivity,
    extrapolate,
    leave_one_out,
    outliers,
)
from optjax.scaling.table import Runs, read_runs, runs

__all__ = [
    "BESIROGLU_2024",
    "FORMS",
    "HOFFMANN_2022",
    "KAPLAN_BATCH",
    "KAPLAN_D",
    "KAPLAN_FRONTIER",
    "KAPLAN_N",
    "KAPLAN_ND",
    "KAPLAN_NS",
    "PF_DAY",
    "Allocation",
    "Bootstrap",
    "Check",
    "Exponents",
    "Extrapolation",
    "Fit",
    "Hoffmann",
    "Interval",
    "KaplanBatch",
    "KaplanFrontier",
    "KaplanND",
    "KaplanNS",
    "Power",
    "Runs",
    "Sensitivity",
    "allocate_frontier",
    "allocate_hoffmann",
    "allocate_kaplan",
    "bootstrap",
    "contradictions",
    "critical_batch",
    "drop_highest",
    "extrapolate",
    "falling",
    "fit",
    "hoffmann_exponents",
    "hoffmann_loss",
    "interval",
    "intervals",
    "kaplan_exponents",
    "kaplan_nd_loss",
    "kaplan_ns_loss",
    "least_steps",
    "leave_one_out",
    "objective",
    "outliers",
    "power_loss",
    "predictions",
    "read_runs",
    "runs",
    "training_flops",
]
