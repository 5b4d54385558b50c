"""Array and key aliases, and the glossary of shape letters.

=======  ==========================================================
letter   meaning
=======  ==========================================================
n        examples in the training data
d        parameters of a linear model
B        slots of a batch (static); b of them are used (may be traced)
T        steps of a run; R records, one every k = T / R steps
H, W     height and width of a picture in pixels
C, F     channels in, channels (filters) out
K        colours of a palette
=======  ==========================================================
"""

from collections.abc import Mapping
from typing import Any, Literal

import jax

Array = jax.Array
Key = jax.Array
PyTree = Any
Better = Literal["low", "high"]
"""Whether a value is to be low or high."""
HParams = Mapping[str, Any]
"""Numbers and arrays by name; a `Piecewise` or a tree like the parameters where a run takes one."""
