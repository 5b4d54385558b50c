"""Hyperparameters by gradient descent on what the run makes."""

from optjax.tuning.descent import Tuning, TuningInterrupted, tune

__all__ = ["Tuning", "TuningInterrupted", "tune"]
