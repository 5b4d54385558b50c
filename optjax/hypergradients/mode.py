"""What every mode of differentiating a run has; the modes themselves are one file each."""

from typing import Any, ClassVar, NamedTuple

from optjax.hypergradients.job import Job
from optjax.run.core import Outcome
from optjax.run.problems import Data
from optjax.support.types import Array, HParams, Key, PyTree


class Found(NamedTuple):
    """What a mode finds."""

    value: Array  # ()
    gradient: PyTree  # like theta
    outcome: Outcome
    aux: dict[str, Any]  # what else the mode knows of it


class Footprint(NamedTuple):
    """Bytes that a run's derivative is made of."""

    state: int  # a state of the run
    params: int  # its parameters
    step: int  # what reverse mode keeps of a step
    rest: int  # parameters, gradients and data, whatever the mode
    reversible: bool = True  # whether a step has a reverse mode


class Option(NamedTuple):
    """A mode that was thought of."""

    mode: "Mode"
    bytes: int  # of temporaries, predicted
    runs: float  # time, in runs without a derivative, predicted


class Choice(NamedTuple):
    """The mode to take, and why."""

    mode: "Mode"
    reason: str  # one line
    options: tuple[Option, ...] = ()

    def __str__(self) -> str:
        return self.reason


class Mode:
    """A way to differentiate a run: a frozen dataclass, hashable."""

    name: ClassVar[str]
    """As `oj.hypergrad` calls it."""
    reverses: ClassVar[bool] = False
    """Whether it needs the reverse mode of a step."""
    perturbs: ClassVar[bool] = False
    """Whether it needs values alone, and so serves whole numbers."""
    not_finite: ClassVar[str] = "the gradient overflowed"
    """Why a gradient is not finite where the run did not diverge."""
    never_finite: ClassVar[str] = (
        "the gradient overflowed at every point {tried}, though the runs did not diverge: start "
        "elsewhere, or take fewer steps"
    )
    """The same, of a tuning that found no finite gradient at all."""

    def check(self, job: Job, names: frozenset[str]) -> None:
        """Refuse, before anything is traced, what the mode cannot serve."""

    def bytes(self, job: Job, found: Footprint, numbers: int) -> int:
        """Predict the temporaries of a hypergradient by so many numbers."""
        raise NotImplementedError

    def cost(self, job: Job, found: Footprint, numbers: int) -> float:
        """Predict the time, in runs without a derivative."""
        raise NotImplementedError

    def choice(self, job: Job, data: Data, theta: HParams, rest: HParams) -> Choice:
        """Return the mode that computes: itself, unless it only chooses.

        Raises:
          UserError: its memory does not fit.
        """
        return Choice(self, "asked for")

    def refusal(self, aux: dict[str, Any], status: int, dtype: Any) -> str | None:
        """Say why a finished call has no gradient, in a line; None where NaN says it."""
        return None

    def __call__(self, job: Job, data: Data, theta: HParams, rest: HParams, key: Key) -> Found:
        """Compute the value and its gradient by theta, a dict of floating arrays."""
        raise NotImplementedError
