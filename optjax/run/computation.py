"""What can be swept: a computation that starts, advances and finishes.

A run is one; so are a hypergradient (one record: its value and gradient) and a tuning (its steps
are outer steps). `optjax.sweeps` carries many of them out side by side.
"""

from typing import Any, NamedTuple, Protocol

from optjax.run.problems import Data
from optjax.support.types import Array, HParams, Key


class Finished(NamedTuple):
    """How a computation ended, and what is kept of it."""

    status: Array  # () int32, a Status
    diverged_at: Array  # () int32, the step at which a value stopped being finite; −1 if none did
    kept: dict[str, Array]


class State(Protocol):
    """What persists from one step to the next: a NamedTuple with these fields among others."""

    step: Any  # () int32, steps done
    diverged_at: Any  # () int32, as in `Finished`

    def _replace(self, **fields: Any) -> Any: ...


class Computation(Protocol):
    """The static part of a computation: hashable, since equal ones share compiled programs."""

    def start(self, data: Data, hparams: HParams, key: Key) -> Any:
        """The `State` before the first step."""
        ...

    def advance(
        self, data: Data, hparams: HParams, state: Any, steps: Array
    ) -> tuple[Any, dict[str, Array]]:
        """The state after so many steps, a number that may be traced; one record, by name."""
        ...

    def finish(self, data: Data, hparams: HParams, state: Any) -> Finished:
        """How it ended, judged at its last state."""
        ...
