"""Which exact mode takes least time in the memory there is: predicted, not tried."""

import dataclasses

from optjax.hypergradients import footprint
from optjax.hypergradients.forward import Forward
from optjax.hypergradients.job import Job, size
from optjax.hypergradients.mode import Choice, Found, Mode, Option
from optjax.hypergradients.one_step import OneStep
from optjax.hypergradients.recursive import Recursive
from optjax.hypergradients.reverse import Reverse
from optjax.hypergradients.segmented import Segmented
from optjax.run.problems import Data
from optjax.support.types import HParams, Key

EXACT: tuple[Mode, ...] = (Forward(), Reverse(), Segmented(), Recursive())
"""The exact modes that "auto" chooses from."""


@dataclasses.dataclass(frozen=True)
class Auto(Mode):
    """The fastest exact mode that fits."""

    name = "auto"

    def choice(self, job: Job, data: Data, theta: HParams, rest: HParams) -> Choice:
        """Choose the mode of least predicted time among those whose memory fits."""
        numbers, steps = size(theta), job.plan.steps
        if steps == 1:
            reason = "one_step: the run has one step, no second derivative is needed"
            return Choice(OneStep(), reason)
        found, free = footprint.of_run(job, data, theta, rest), footprint.available()
        options = tuple(
            Option(m, m.bytes(job, found, numbers), m.cost(job, found, numbers))
            for m in EXACT
            if found.reversible or not m.reverses
        )
        fits = [o for o in options if o.bytes <= free] or [min(options, key=lambda o: o.bytes)]
        best = min(fits, key=lambda o: o.runs)
        loops = "" if found.reversible else "; its while loop has no reverse mode"
        others = ", ".join(
            f"{o.mode.name} {o.runs:.1f} and {footprint.readable(o.bytes)}"
            for o in options
            if o is not best
        )
        many = "1 number" if numbers == 1 else f"{numbers} numbers"
        reason = (
            f"{best.mode.name}: by {many} through {steps} steps it is predicted to take the time "
            f"of {best.runs:.1f} runs and {footprint.readable(best.bytes)} (of "
            f"{footprint.readable(free)} free){loops}; {others or 'no other serves'}"
        )
        return Choice(best.mode, reason, options)

    def __call__(self, job: Job, data: Data, theta: HParams, rest: HParams, key: Key) -> Found:
        mode = self.choice(job, data, theta, rest).mode
        return mode(job, data, theta, rest, key)
