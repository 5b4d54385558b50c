"""When a run of a sweep stops before its last step.

A rule sees what a run records, record by record, inside the compiled program: a run that stops
keeps the state of that record, whatever the chunks in which the sweep was cut. `Halving` compares
runs with each other and is applied between chunks, at steps known beforehand.

A run that has diverged leaves the sweep in any case (unless `keep_diverged` says otherwise).
"""

import dataclasses
from typing import Any, Protocol

import jax.numpy as jnp
import numpy as np

from optjax.support.errors import UserError, nearest, sign_of, whole
from optjax.support.types import Array, Better, PyTree


class Rule(Protocol):
    """A rule of one run: pure, written for one run, traced once.

    `init` gives its state; `update` takes the state, the step of the record and what was recorded
    (``loss`` and the problem's metrics) and gives the new state and whether the run stops.
    """

    @property
    def name(self) -> str: ...
    @property
    def metric(self) -> str: ...
    def init(self) -> PyTree: ...
    def update(
        self, state: PyTree, step: Array, values: dict[str, Array]
    ) -> tuple[PyTree, Array]: ...


@dataclasses.dataclass(frozen=True)
class Target:
    """Stop at the first record whose metric has reached a value.

    Args:
      value: the target.
      metric: of the problem. By default ``"loss"``, the mini-batch loss since the record before; of
        a tuning, its best value so far.
      better: whether the metric is to be low or high.
    """

    value: float
    metric: str = ""
    better: Better = "low"
    name: str = dataclasses.field(default="target", init=False)

    def __post_init__(self) -> None:
        sign_of(self.better)
        number = isinstance(self.value, int | float | np.number)
        if not number or isinstance(self.value, bool) or not np.isfinite(self.value):
            raise UserError(f"target is {self.value!r}: expected a finite number")
        object.__setattr__(self, "value", float(self.value))

    def init(self) -> PyTree:
        return ()

    def update(self, state: PyTree, step: Array, values: dict[str, Array]):
        now = _real(values[self.metric])
        goal = jnp.asarray(self.value, now.dtype)
        return state, (now <= goal) if self.better == "low" else (now >= goal)


@dataclasses.dataclass(frozen=True)
class Plateau:
    """Stop once the best value of a metric is `patience` steps old.

    Args:
      patience: steps without an improvement.
      metric, better: as in `Target`.
      least: what counts as an improvement, relative to the best value so far.
    """

    patience: int
    metric: str = ""
    better: Better = "low"
    least: float = 0.0
    name: str = dataclasses.field(default="plateau", init=False)

    def __post_init__(self) -> None:
        sign_of(self.better)
        whole("patience", self.patience, 1)

    def init(self) -> PyTree:
        return jnp.full((), jnp.inf, float), jnp.zeros((), jnp.int32)

    def update(self, state: PyTree, step: Array, values: dict[str, Array]):
        best, at = state
        now = _real(values[self.metric]).astype(best.dtype)
        now = sign_of(self.better) * now
        margin = jnp.asarray(self.least, best.dtype) * jnp.abs(best)
        better = now < jnp.where(jnp.isfinite(best), best - margin, best)
        best, at = jnp.where(better, now, best), jnp.where(better, step, at)
        return (best, at), step - at >= self.patience


@dataclasses.dataclass(frozen=True)
class Halving:
    """Successive halving: at steps r, rη, rη², … only the best 1/η of the runs stay.

    Args:
      first: r, the step of the first selection; must be a multiple of the run's record_every.
      keep: 1/η, the share that stays.
      metric, better: as in `Target`, at the record of that step; a diverged run is the worst.

    Source: Jamieson and Talwalkar (2016), algorithm 1.
    """

    first: int
    keep: float = 1 / 3
    metric: str = ""
    better: Better = "low"
    name: str = dataclasses.field(default="halving", init=False)

    def __post_init__(self) -> None:
        sign_of(self.better)
        if not isinstance(self.keep, int | float | np.number) or not 0 < self.keep < 1:
            raise UserError(f"keep is {self.keep!r}: expected a share between 0 and 1")
        whole("first", self.first, 1)

    def steps(self, last: int, every: int) -> list[int]:
        """List the steps of the selections, all before `last` and multiples of `every`."""
        found, at = [], float(self.first)
        while round(at / every) * every < last:
            if (step := max(1, round(at / every)) * every) not in found:
                found.append(step)
            at /= self.keep
        return found

    def select(self, values: np.ndarray, runs: int) -> np.ndarray:
        """Select the runs that stay, (L,) bool: the best ⌈runs · keep⌉, ties to the earlier."""
        values = sign_of(self.better) * values
        order = np.argsort(np.where(np.isfinite(values), values, np.inf), kind="stable")
        chosen = np.zeros(len(values), bool)
        chosen[order[: int(np.ceil(runs * self.keep - 1e-9))]] = True
        return chosen & np.isfinite(values)


def _real(value: Array) -> Array:
    """Return a metric as a number that can be compared: at least float32."""
    from optjax.run.loops import widened

    return value.astype(widened(value.dtype))


def checked(
    rules: Any, metrics: set[str], every: int, default: str = "loss"
) -> tuple[tuple[Any, ...], Halving | None]:
    """Split the rules of single runs from the one that compares runs, if there is one.

    Args:
      rules: one, or several.
      metrics: the names of what is recorded.
      every: steps from record to record.
      default: the metric of a rule that names none.

    Raises:
      UserError: no rule, two that compare, or a metric that is not recorded.
    """
    given = rules if isinstance(rules, list | tuple) else (rules,)
    for rule in given:
        if not hasattr(rule, "metric") or isinstance(rule, type):
            raise UserError(f"stop holds {rule!r}: expected rules, as oj.Target(0.1)")
    rules = tuple(r if r.metric else dataclasses.replace(r, metric=default) for r in given)
    for rule in rules:
        if rule.metric not in metrics:
            raise UserError(f"unknown metric {rule.metric!r}: {nearest(rule.metric, metrics)}")
        try:
            hash(rule)
        except TypeError:
            raise UserError(
                f"stop holds a {type(rule).__name__}, which is not hashable: freeze its dataclass"
            ) from None
    comparing = [rule for rule in rules if isinstance(rule, Halving)]
    if len(comparing) > 1:
        raise UserError("stop holds two Halving rules: expected one at most")
    if comparing and comparing[0].first % every:
        raise UserError(
            f"Halving's first is {comparing[0].first}: expected a multiple of record_every, {every}"
        )
    return tuple(r for r in rules if not isinstance(r, Halving)), next(iter(comparing), None)
