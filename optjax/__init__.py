"""optjax: a training run is a pure function of its hyperparameters and its seed.

The public names are below; each is imported when it is first used, so that `optjax --help` does
not wait for jax.
"""

import os
from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from optjax import scaling
    from optjax.batching import Batch, masked_mean
    from optjax.errors import UserError
    from optjax.hypergradients.descent import online
    from optjax.hypergradients.gradient import Hypergradient, hypergrad
    from optjax.networks import flax_problem
    from optjax.noise.batch_sizes import critical_batch_size
    from optjax.noise.curvature_scale import curvature_noise_scale
    from optjax.noise.measured import per_example_noise_scale, two_batch_noise_scale
    from optjax.noise.quadratic import noisy_quadratic
    from optjax.noise.recorded import with_noise_scale
    from optjax.optimizers import differentiable, rmsprop, safe_sqrt, with_weight_decay
    from optjax.problems import Data, Problem, least_squares, quadratic
    from optjax.scan import Records, RunState, Status, Trajectory
    from optjax.schedules import Schedule
    from optjax.sweeps import load_sweep, replay, sweep
    from optjax.sweeps.grid import drawn, span, table, zipped
    from optjax.sweeps.rules import Halving, Plateau, Target
    from optjax.trajectory import Run, make_run
    from optjax.tuning import Tuning, tune

__version__ = "0.1.0"


def _prefer_fast_convolutions() -> None:
    """Leave convolutions out of the library that XLA gives them to on the CPU, where it is slower.

    A training step of a network takes a fifth less time on jax 0.10, and on 0.12 the same or a
    little less. No option of a program reaches a user's own ``jax.jit(run)``; this one reaches
    every program compiled after the import, if XLA has compiled none before it.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if metadata.version("jax").startswith(("0.10.", "0.11.", "0.12.")) and "ynn" not in flags:
        chosen = "--xla_cpu_experimental_ynn_fusion_type=-individual_convolution"
        os.environ["XLA_FLAGS"] = f"{flags} {chosen}".strip()


_prefer_fast_convolutions()

_HOME = {
    "Batch": "batching",
    "masked_mean": "batching",
    "UserError": "errors",
    "differentiable": "optimizers",
    "rmsprop": "optimizers",
    "safe_sqrt": "optimizers",
    "with_weight_decay": "optimizers",
    "Data": "problems",
    "critical_batch_size": "noise.batch_sizes",
    "curvature_noise_scale": "noise.curvature_scale",
    "noisy_quadratic": "noise.quadratic",
    "per_example_noise_scale": "noise.measured",
    "two_batch_noise_scale": "noise.measured",
    "with_noise_scale": "noise.recorded",
    "Problem": "problems",
    "flax_problem": "networks",
    "least_squares": "problems",
    "quadratic": "problems",
    "Records": "scan",
    "Run": "trajectory",
    "RunState": "scan",
    "Schedule": "schedules",
    "Status": "scan",
    "Trajectory": "scan",
    "make_run": "trajectory",
    "Hypergradient": "hypergradients.gradient",
    "hypergrad": "hypergradients.gradient",
    "online": "hypergradients.descent",
    "load_sweep": "sweeps",
    "replay": "sweeps",
    "sweep": "sweeps",
    "drawn": "sweeps.grid",
    "span": "sweeps.grid",
    "table": "sweeps.grid",
    "zipped": "sweeps.grid",
    "Tuning": "tuning",
    "tune": "tuning",
    "Halving": "sweeps.rules",
    "Plateau": "sweeps.rules",
    "Target": "sweeps.rules",
}

__all__ = [
    "Batch",
    "Data",
    "Halving",
    "Hypergradient",
    "Plateau",
    "Problem",
    "Records",
    "Run",
    "RunState",
    "Schedule",
    "Status",
    "Target",
    "Trajectory",
    "Tuning",
    "UserError",
    "critical_batch_size",
    "curvature_noise_scale",
    "differentiable",
    "drawn",
    "flax_problem",
    "hypergrad",
    "least_squares",
    "load_sweep",
    "make_run",
    "masked_mean",
    "noisy_quadratic",
    "online",
    "per_example_noise_scale",
    "quadratic",
    "replay",
    "rmsprop",
    "safe_sqrt",
    "scaling",
    "span",
    "sweep",
    "table",
    "tune",
    "two_batch_noise_scale",
    "with_noise_scale",
    "with_weight_decay",
    "zipped",
]


def __getattr__(name: str) -> Any:
    if name == "scaling":
        return import_module("optjax.scaling")
    if name not in _HOME:
        raise AttributeError(f"module 'optjax' has no attribute {name!r}")
    value = getattr(import_module(f"optjax.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
