"""`oj.tune`: descend on the hyperparameters, many starts at once."""

import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np
import optax

from optjax.hypergradients import hypergrad
from optjax.hypergradients.evolution import ES, PES
from optjax.hypergradients.implicit import Implicit
from optjax.hypergradients.job import Mode, Of
from optjax.run.trajectory import Run
from optjax.support import provenance
from optjax.support.console import Console
from optjax.support.errors import UserError, whole
from optjax.support.types import HParams
from optjax.tuning import checks, climb, facts
from optjax.tuning import space as spaces
from optjax.tuning.book import Book
from optjax.tuning.space import Range

if TYPE_CHECKING:
    import xarray
    from matplotlib.figure import Figure

Progress = Callable[[str, float], None]

_ADAM = optax.adam(0.1)  # one object: a second tuning shares the first one's program
_PATIENCE = 10
"""Outer steps without any finite run after which there is no point in going on."""


@dataclasses.dataclass(frozen=True)
class Tuning:
    """What `oj.tune` found.

    Attributes:
      hparams: the best point, with what was not tuned beside it: what a run takes.
      value: of it, the mean over the seeds. NaN, and ``hparams`` the start, where it was
        interrupted before any run stayed finite.
      path: a Dataset with axes ``restart`` and ``outer_step``: ``value``, ``finite``,
        ``diverged`` (any of the point's runs), ``gradient_norm`` (of dF/du), ``value_error`` (where
        there are several seeds), and every tuned hyperparameter (a schedule or array with an axis
        of its own).
    """

    hparams: dict[str, Any]
    value: float
    path: "xarray.Dataset"

    def figure(self) -> "Figure":
        """The value and the hyperparameters along the outer steps, all restarts, the best bold."""
        from optjax.tuning.picture import picture

        return picture(self.path)


class TuningInterrupted(KeyboardInterrupt):
    """Ctrl-C after the first outer step: ``.tuning`` holds what was found until then."""

    def __init__(self, tuning: Tuning) -> None:
        super().__init__("interrupted; .tuning holds what was found")
        self.tuning = tuning


def tune(
    run: Run,
    of: Of,
    hparams: HParams,
    outer: optax.GradientTransformation | None = None,
    *,
    steps: int = 100,
    wrt: str | Iterable[str] | None = None,
    constraints: Mapping[str, Range | None] | None = None,
    seeds: int | Iterable[int] = 1,
    fresh_seeds: bool = False,
    restarts: int = 1,
    spread: float = 1.0,
    seed: int = 0,
    mode: str | Mode = "auto",
    out: str | Path | None = None,
    progress: Progress | None = None,
) -> Tuning:
    """Tune hyperparameters by gradient descent, u ← u + outer(dF/du), θ = θ(u).

    u is log θ for a positive hyperparameter and logit θ for a share (momentum, b1, …), so no step
    leaves the range and a step is relative. Where a point's runs diverge, or the square of their
    gradient overflows, the next is half-way back to that restart's last point where none did; if
    it has none, to the best point of all restarts; and if no run has stayed finite yet, the
    tuned learning_rate or max_learning_rate is made smaller by a factor of e.

    Args:
      run, of, mode: as `oj.hypergrad`; F is its value, averaged over the seeds.
      hparams: the start; what is not tuned stays. A rate that changes along a run: `Schedule`.
      outer: descends on u; Adam of rate 0.1 by default (a tenth of θ a step, at first). A new
        object is a new program: make it once, to tune several times.
      steps: outer steps.
      wrt: names to tune; all but the batch size by default.
      constraints: name → (low, high), or None for any number. By default (0, 1) for momentum, b1
        and other shares, (0, ∞) where the start is positive.
      seeds: how many, 0, 1, …; or which. The runs of all points see the same draws.
      fresh_seeds: new seeds at every outer step: F is then the mean over all runs there could be,
        and the last point, not the best seen, is the result.
      restarts: starts, all at once: the given one, and others drawn about it in u.
      spread: their standard deviation in u: 1 is a factor of e.
      seed: of these draws.
      out: a netCDF file that keeps the path and the state, written every 10 seconds and at the
        end; the same call again goes on, or takes more outer steps.
      progress: called with (text, fraction); a bar or lines on stderr by default.

    Returns:
      A `Tuning`; ``.figure()`` draws it.

    Raises:
      UserError: as `oj.hypergrad`; a start outside its range; a file that cannot be written or is
        of another tuning; no finite run in the first 10 outer steps.
      TuningInterrupted: on Ctrl-C, with what was found.

    >>> import jax, optax, optjax as oj
    >>> problem = oj.least_squares([[2.0, 1.0], [0.0, 1.0]], [2.0, 1.0])
    >>> run = oj.make_run(problem, optax.sgd, steps=10, sampler="full")
    >>> found = oj.tune(run, "final_loss", {"learning_rate": 0.01}, steps=30)
    >>> bool(found.value < run({"learning_rate": 0.01}, jax.random.key(0)).final_loss / 10)
    True

    Sources: Bengio (2000); Maclaurin et al. (2015).
    """
    steps, restarts = whole("steps", steps, 1), whole("restarts", restarts, 1)
    seed, spread = whole("seed", seed, 0), checks.spread(spread)
    chosen, names = checks.seeds(seeds), checks.names(wrt)
    checks.others(constraints, progress)
    outer = _ADAM if outer is None else outer
    checks.optimiser(outer)
    gradient = hypergrad(run, of, names, mode)
    theta, rest = gradient.parted(hparams)
    space = spaces.make_space(theta, constraints or {})
    checks.serves(outer, space.outside(theta))
    settings = {
        "of": gradient.job.name, **facts.described("start of ", theta),
        **facts.described("fixed ", rest), "ranges": str(space.ranges),
        "seeds": str(chosen.tolist()), "fresh_seeds": str(bool(fresh_seeds)),
        "restarts": str(restarts), "spread": str(spread), "seed": str(seed),
        "mode": str(gradient.mode),
    }  # fmt: skip
    book = Book(
        theta, space, rest,
        lambda: settings | facts.everything(gradient, outer, climb.advance),
        _file(out),
    )  # fmt: skip
    program = climb.make_program(gradient, space, outer, theta, rest, restarts, len(chosen))
    state = book.resumed(climb.start(program, theta, restarts, spread, seed))
    if book.done < steps:
        book.writable()
    begin = time.perf_counter()

    def found() -> Tuning:
        path = book.dataset()
        path.attrs |= {
            "settings": json.dumps(settings), "commit": provenance.commit(),
            "versions": json.dumps(provenance.versions()), "seconds": time.perf_counter() - begin,
        }  # fmt: skip
        hparams, value = book.best(last=bool(fresh_seeds))
        return Tuning(hparams, value, path)

    # Fresh ones must not meet those of another step.
    stride = int(np.ptp(chosen)) + 1 if fresh_seeds else 0
    with Console().late("tune") as late:
        tell = progress or late
        try:
            for k in range(book.done, steps):
                if k >= _PATIENCE and math.isnan(book.least()):
                    break
                state, seen = climb.advance(
                    program, run.problem.data, rest, state, jnp.asarray(chosen + k * stride)
                )
                book.add(state, {name: np.asarray(v) for name, v in seen.items()})
                tell(f"outer step {k + 1} of {steps}, best {book.least():.4g}", (k + 1) / steps)
        except KeyboardInterrupt:
            if not book.done:
                raise
            raise TuningInterrupted(found()) from None
        finally:
            book.save()
    if math.isnan(book.least()):
        raise UserError(_why(book, gradient.mode))
    return found()


def _file(out: Any) -> Path | None:
    try:
        return None if out is None else Path(out)
    except TypeError:
        raise UserError(f"out is {out!r}: expected the name of a file") from None


def _why(book: Book, mode: Mode) -> str:
    """No point was finite: a line that says why."""
    tried = f"of {book.done} outer steps"
    if book.seen("diverged").any():
        return f"every point {tried} diverged: start from a smaller learning rate, or constrain it"
    if isinstance(mode, Implicit):
        return (
            f"mode 'implicit': at no point {tried} have the runs converged; take more steps, a "
            "larger tolerance, or mode 'segmented'"
        )
    if isinstance(mode, ES | PES):
        return f"perturbed runs diverged at every point {tried}: take a smaller sigma"
    return (
        f"the gradient overflowed at every point {tried}, though the runs did not diverge: start "
        "elsewhere, or take fewer steps"
    )
