"""The protocol of a computation that can be swept: it starts, advances and finishes.

A run follows it; so do a hypergradient (one record: its value and gradient) and a tuning (its
steps are outer steps). `optjax.sweeps` carries out many at once.
"""

from typing import Any, NamedTuple, Protocol

from optjax.run.problems import Data
from optjax.support.types import Array, HParams, Key


class Finished(NamedTuple):
    """The status of a computation at its end, and the arrays to keep."""

    status: Array  # () int32, a Status
    diverged_at: Array  # () int32, the step at which a value stopped being finite; −1 if none did
    kept: dict[str, Array]


class State(Protocol):
    """The values that persist from step to step: a NamedTuple with these fields among others."""

    step: Any  # () int32, steps done
    diverged_at: Any  # () int32, as in `Finished`

    def _replace(self, **fields: Any) -> Any: ...


class Computation(Protocol):
    """The static part of a computation: hashable, since equal ones share compiled programs."""

    def start(self, data: Data, hparams: HParams, key: Key) -> Any:
        """Return the `State` before the first step."""
        ...

    def advance(
        self, data: Data, hparams: HParams, state: Any, steps: Array
    ) -> tuple[Any, dict[str, Array]]:
        """Take `steps` steps (may be traced); return the state after them, and one record."""
        ...

    def finish(self, data: Data, hparams: HParams, state: Any) -> Finished:
        """Judge the computation at its last state."""
        ...
