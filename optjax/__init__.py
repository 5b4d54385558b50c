"""optjax: a training run is a pure function of its hyperparameters and its seed."""

from optjax.batching import Batch, masked_mean
from optjax.errors import UserError
from optjax.optimizers import differentiable, rmsprop, safe_sqrt, with_weight_decay
from optjax.problems import Data, Problem, flax_problem, least_squares, quadratic
from optjax.trajectory import Records, Run, RunState, Status, Trajectory, make_run

__version__ = "0.1.0"

__all__ = [
    "Batch",
    "Data",
    "Problem",
    "Records",
    "Run",
    "RunState",
    "Status",
    "Trajectory",
    "UserError",
    "differentiable",
    "flax_problem",
    "least_squares",
    "make_run",
    "masked_mean",
    "quadratic",
    "rmsprop",
    "safe_sqrt",
    "with_weight_decay",
]
