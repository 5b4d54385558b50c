"""Which exact mode takes least time in the memory there is: predicted, not tried."""

import dataclasses
import math
from typing import Any, NamedTuple

from optjax.hypergradients import kept_bytes
from optjax.hypergradients.forward import Forward
from optjax.hypergradients.job import Found, Job, Mode, nothing_to_check, size
from optjax.hypergradients.one_step import OneStep
from optjax.hypergradients.recursive import Recursive
from optjax.hypergradients.reverse import Reverse
from optjax.hypergradients.segmented import Segmented
from optjax.run.problems import Data
from optjax.support.types import HParams, Key


class Option(NamedTuple):
    """A mode that was thought of."""

    mode: Mode
    bytes: int  # of temporaries, predicted
    runs: float  # time, in runs without a derivative, predicted


class Choice(NamedTuple):
    """What was chosen, and why."""

    mode: Mode
    reason: str  # one line
    options: tuple[Option, ...]

    def __str__(self) -> str:
        return self.reason


@dataclasses.dataclass(frozen=True)
class Auto:
    """The fastest exact mode that fits."""

    name = "auto"
    check = staticmethod(nothing_to_check)

    def __call__(self, job: Job, data: Data, theta: HParams, rest: HParams, key: Key) -> Found:
        mode = choose(job, data, theta, rest).mode
        return mode(job, data, theta, rest, key)


_CACHE = 2**25
"""Bytes that stay near the processor: reverse mode that writes more waits for memory."""


def choose(job: Job, data: Data, theta: HParams, rest: HParams) -> Choice:
    """The mode of least predicted time among those whose memory fits."""
    numbers, steps = size(theta), job.plan.steps
    if steps == 1:
        reason = "one_step: the run has one step, no second derivative is needed"
        return Choice(OneStep(), reason, ())
    found, free = kept_bytes.footprint(job, data, theta, rest), kept_bytes.available()
    options = tuple(
        Option(mode, kept_bytes.predicted(mode, job, found, numbers), 0.0)
        for mode in (Forward(), Reverse(), Segmented(), Recursive())
        if found.reversible or isinstance(mode, Forward)
    )
    options = tuple(o._replace(runs=_runs(o, numbers, steps)) for o in options)
    fits = [o for o in options if o.bytes <= free] or [min(options, key=lambda o: o.bytes)]
    best = min(fits, key=lambda o: o.runs)
    loops = "" if found.reversible else "; its while loop has no reverse mode"
    others = ", ".join(
        f"{o.mode.name} {o.runs:.1f} and {kept_bytes.readable(o.bytes)}"
        for o in options
        if o is not best
    )
    others = others or "no other serves"
    many = "1 number" if numbers == 1 else f"{numbers} numbers"
    reason = (
        f"{best.mode.name}: by {many} through {steps} steps it is predicted to take the time of "
        f"{best.runs:.1f} runs and {kept_bytes.readable(best.bytes)} (of "
        f"{kept_bytes.readable(free)} free){loops}; {others}"
    )
    return Choice(best.mode, reason, options)


def _runs(option: Option, numbers: int, steps: int) -> float:
    """Time in runs without a derivative."""
    mode: Any = option.mode
    if isinstance(mode, Forward):
        return 1 + 1.0 * numbers
    if isinstance(mode, Reverse):
        return 3.0 if option.bytes <= _CACHE else 5.0
    if isinstance(mode, Segmented):
        return 4.0
    return 4.0 + math.log(steps, mode.branching)
