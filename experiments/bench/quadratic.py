"""The table of steps to a target of the noisy quadratic, beside the same in NumPy."""

import functools
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from optjax.theory.quadratic_table import quadratic_steps

from .measure import Entry, Side

TARGET, MAX_STEPS = 0.01, 2**24


class QuadraticSizes(NamedTuple):
    """Curvatures, and the table's three axes; NumPy does every `part`-th rate, scaled."""

    spectrum: int = 10_000
    powers: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75)
    batches: int = 20
    rates: int = 100
    part: int = 10


QUICK = QuadraticSizes(spectrum=200, powers=(0.0, 0.5), batches=3, rates=10, part=2)


def entries(sizes: QuadraticSizes) -> list[Entry]:
    """Ours, compiled, and NumPy's closed form by bisection, plain and with our savings."""
    what = (
        f"steps to a target of {len(sizes.powers)} preconditioners × {sizes.batches} batch sizes × "
        f"{sizes.rates} rates, {sizes.spectrum} curvatures, float64"
    )
    return [Entry("quadratic", what, "s", "ours", lambda entry: _prepare(entry, sizes))]


def _prepare(entry: Entry, sizes: QuadraticSizes) -> list[Side]:
    h = 1 / np.arange(1, sizes.spectrum + 1.0)
    batches, rates = 2.0 ** np.arange(2, 2 + sizes.batches), np.logspace(-5, 0.5, sizes.rates)

    def ours() -> float:
        with jax.enable_x64(True):
            start = time.perf_counter()
            quadratic_steps(
                h, target=TARGET, batch_sizes=batches, rates=rates, powers=sizes.powers,
                max_steps=MAX_STEPS,
            )  # fmt: skip
            return time.perf_counter() - start

    with jax.enable_x64(True):
        table = quadratic_steps(
            h, target=TARGET, batch_sizes=batches, rates=rates, powers=sizes.powers
        )
    chosen = slice(sizes.part // 2, None, sizes.part)
    sides = [Side("ours", ours)]
    for name, count in {"plain": plain, "with our savings": saving}.items():
        found = np.array([[[count(h, p, b, r) for r in rates[chosen]] for b in batches]
                          for p in sizes.powers])  # fmt: skip
        off = int(np.sum(found != table[..., chosen]))
        entry.notes.append(
            f"quadratic: NumPy, {name}: {off} of {found.size} counts differ from ours"
        )
        sides.append(Side(f"NumPy, {name}, scaled", functools.partial(_numpy, count, h, sizes), 3))
    return sides


def _numpy(count: Callable[..., float], h: np.ndarray, sizes: QuadraticSizes) -> float:
    batches, rates = 2.0 ** np.arange(2, 2 + sizes.batches), np.logspace(-5, 0.5, sizes.rates)
    chosen = rates[sizes.part // 2 :: sizes.part]
    start = time.perf_counter()
    for power in sizes.powers:
        for size in batches:
            for rate in chosen:
                count(h, power, size, rate)
    return (time.perf_counter() - start) * sizes.rates / len(chosen)


def _closed_form(h: np.ndarray, power: float, size: float, rate: float):
    k, q = h ** (1 - power), h ** (1 - 2 * power) / size
    rho = (1 - rate * k) ** 2
    with np.errstate(all="ignore"):
        ends = rate**2 * q / (1 - rho)
    return rho, ends


def plain(h: np.ndarray, power: float, size: float, rate: float) -> float:
    """Bisection of the closed form, an entry after the other, as the published notebook does."""
    rho, ends = _closed_form(h, power, size, rate)

    def risk(steps: int) -> float:
        with np.errstate(all="ignore"):
            decay = rho**steps
            return float(0.5 * np.sum(h * (decay + (1 - decay) * ends)))

    if not risk(MAX_STEPS) <= TARGET:
        return np.inf
    low, high = 0, MAX_STEPS
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if risk(middle) <= TARGET else (middle, high)
    return float(high)


def saving(h: np.ndarray, power: float, size: float, rate: float) -> float:
    """The same with no search where the end is above the target, logarithms, and BLAS."""
    rho, ends = _closed_form(h, power, size, rate)
    floor = 0.5 * h @ ends
    if not (rho.max() < 1 and floor <= TARGET):
        return plain(h, power, size, rate) if rho.max() < 1 and ends.max() > 1 else np.inf
    with np.errstate(all="ignore"):
        logs = np.log(rho)
    weight = 0.5 * h * (1 - ends)

    def risk(steps: int) -> float:
        return float(floor + weight @ np.exp(steps * logs))

    low, high = 0, 1
    while risk(high) > TARGET:
        low, high = high, 2 * high
        if high > MAX_STEPS:
            return np.inf
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if risk(middle) <= TARGET else (middle, high)
    return float(high)
