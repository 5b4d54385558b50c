"""Sides of a benchmark, measured in turn (A B A B), and what is said of them."""

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from statistics import median
from typing import Any, NamedTuple

import jax


class Side(NamedTuple):
    """One of the things compared."""

    name: str
    measure: Callable[[], float]  # one value, in the benchmark's unit
    rounds: int | None = None  # measured in the first rounds only: for what is very slow


@dataclass
class Entry:
    """A benchmark and what has been measured of it so far."""

    name: str
    what: str
    unit: str
    reference: str | None  # the side that ratios are taken to
    prepare: Callable[["Entry"], list[Side]]  # builds, compiles and warms the sides
    values: dict[str, list[float]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)  # whatever else is known of it
    cost: Callable[[], float] = lambda: 0.0  # seconds that it is predicted to take
    missing: str = ""  # why it has not, or not wholly, been measured
    load_average: list[float] = field(default_factory=list)

    def rounds(self, repeats: int) -> Iterator[int]:
        """Measure every side once a round, in turn; yields after each round."""
        self.load_average = load_average()
        sides = self.prepare(self)
        for done in range(repeats):
            for side in sides:
                if side.rounds is None or done < side.rounds:
                    value = side.measure()
                    self.values.setdefault(side.name, []).append(value)
            yield done + 1

    def ratios(self) -> dict[str, dict[str, float]]:
        """Each side over the reference, round by round, so that a drift of the machine cancels."""
        if self.reference is None or self.reference not in self.values:
            return {}
        base = self.values[self.reference]
        return {
            name: summary([v / b for v, b in zip(values, base, strict=False)])
            for name, values in self.values.items()
            if name != self.reference
        }

    def record(self) -> dict[str, Any]:
        """What is saved of it."""
        return {
            "name": self.name,
            "what": self.what,
            "unit": self.unit,
            "sides": {
                name: {**summary(values), "values": values} for name, values in self.values.items()
            },
            "reference": self.reference,
            "ratios": self.ratios(),
            "load_average": self.load_average,
            "notes": self.notes,
            "facts": self.facts,
            "missing": self.missing,
        }


def summary(values: list[float]) -> dict[str, float]:
    """Median, lowest and highest.

    >>> summary([3.0, 1.0, 2.0])
    {'median': 2.0, 'min': 1.0, 'max': 3.0}
    """
    return {"median": median(values), "min": min(values), "max": max(values)}


def seconds(call: Callable[[], Any]) -> float:
    """Wall-clock seconds until the call's arrays are there."""
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


def load_average() -> list[float]:
    """Over the last 1, 5 and 15 minutes; empty where the system does not say."""
    return [round(x, 2) for x in os.getloadavg()] if hasattr(os, "getloadavg") else []
