"""The gradient of a run by its hyperparameters: modes, one a file, and what is built on them."""

from optjax.hypergradients.evolution import ES, PES
from optjax.hypergradients.forward import Forward
from optjax.hypergradients.hypergradient import Hypergradient, NonFiniteHypergradient, hypergrad
from optjax.hypergradients.implicit import Implicit
from optjax.hypergradients.one_step import OneStep
from optjax.hypergradients.recursive import Recursive
from optjax.hypergradients.reverse import Reverse
from optjax.hypergradients.segmented import Segmented
from optjax.hypergradients.truncated import Truncated

__all__ = [
    "ES",
    "PES",
    "Forward",
    "Hypergradient",
    "Implicit",
    "NonFiniteHypergradient",
    "OneStep",
    "Recursive",
    "Reverse",
    "Segmented",
    "Truncated",
    "hypergrad",
]
