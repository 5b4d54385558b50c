"""Many runs at once: `sweep` a grid of hyperparameters and seeds, `replay` one of its runs."""

from optjax.sweeps.folder import load_sweep
from optjax.sweeps.replaying import replay
from optjax.sweeps.sweeping import sweep

__all__ = ["load_sweep", "replay", "sweep"]
