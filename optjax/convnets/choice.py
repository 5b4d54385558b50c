"""The choice of a way to convolve many runs on a device: measured there once, and remembered.

The fastest way depends on the device, the sizes and the number of runs, and no rule of thumb holds
for all. So the first program that is lowered for a local device measures the ways at its own
sizes, and later ones read the user's cache.
"""

import hashlib
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, get_args

import jax
import numpy as np

from optjax.convnets.device_forms import Way, of_runs
from optjax.convnets.window import Window
from optjax.support.cache import Remembered

WAYS: tuple[Way, ...] = get_args(Way)

MEASURED = Remembered("convolutions.json")

_WORTH_MEASURING = 1e8
"""Multiply-adds below which a device takes longer to start a program than to compute it."""

_SECONDS = 0.02
"""Time of the calls that are timed together."""


def default(platforms: tuple[str, ...]) -> Way:
    """Return the way where nothing can be measured, as in an export for an absent platform.

    By the cycles that a TPU's compiler estimates (libtpu 0.0.52, v5e, 2 to 32 runs), a run in a
    group takes 1 to 3 times as long as alone, and a product 2 to 40 times as long as a group: its
    copies are padded to 128 channels. Elsewhere a product is linear in the runs, whatever the
    library does with groups.
    """
    return "grouped" if platforms == ("tpu",) else "product"


class ConvolutionOfRuns(NamedTuple):
    """A convolution of many runs: a primitive, and its sizes."""

    name: str  # of the primitive
    window: Window
    shapes: tuple[tuple[int, ...], tuple[int, ...]]  # of its arguments, (R, ...) each
    dtype: np.dtype

    def __str__(self) -> str:
        (h, w), (kh, kw), stride, _ = self.window
        sizes = " by ".join("x".join(map(str, shape[1:])) for shape in self.shapes)
        return f"{self.name} {kh}x{kw} of {h}x{w}, stride {max(stride)}: {sizes} {self.dtype.name}"

    @property
    def multiply_adds(self) -> int:
        """Multiply-adds of all runs: outputs × taps × channels in × channels out."""
        a, b = self.shapes
        channels = b[3] * b[4] if self.name != "conv_to_kernel" else a[4] * b[4]
        return a[0] * a[1] * math.prod((*self.window.out, *self.window.kernel)) * channels


class Measured(NamedTuple):
    """The measured times of one convolution on one device."""

    device: str
    convolution: str
    runs: int
    ms: dict[str, float]  # way → milliseconds of a call
    way: str  # the fastest


def way(runs: ConvolutionOfRuns, platforms: tuple[str, ...]) -> Way:
    """Choose the way for a program that is lowered for these platforms.

    It is measured if there is one platform, with a local device, and one process: several processes
    must run the same program.
    """
    device = _device(platforms)
    if device is None or runs.multiply_adds < _WORTH_MEASURING:
        return default(platforms)
    count = runs.shapes[0][0]
    # Numbers of runs share a measurement between one power of two and the next.
    facts = (
        device.device_kind,
        jax.__version__,
        str(runs),
        runs.window.padding,
        int(math.log2(count)),
    )
    key = hashlib.sha256(repr(facts).encode()).hexdigest()[:24]
    known = _read(MEASURED.entries().get(key))
    if known is None:
        # In another thread, since this one is in the midst of a trace.
        with ThreadPoolExecutor(1) as pool:
            ms = pool.submit(_measure, runs, device).result()
        if not ms:
            return default(platforms)
        known = Measured(device.device_kind, str(runs), count, ms, min(ms, key=ms.__getitem__))
        MEASURED.keep(key, known._asdict())
    return next(each for each in WAYS if each == known.way)


def measured() -> list[Measured]:
    """Return all remembered measurements, of every device, the oldest first."""
    return [found for entry in MEASURED.entries().values() if (found := _read(entry))]


def _read(entry: Any) -> Measured | None:
    """Parse an entry of the file; None if it is malformed."""
    try:
        found = Measured(**entry)
        ms = {name: float(found.ms[name]) for name in WAYS if name in found.ms}
        known = Measured(str(found.device), str(found.convolution), int(found.runs), ms, found.way)
    except (TypeError, ValueError, AttributeError):
        return None
    return known if known.way in ms else None


def _device(platforms: tuple[str, ...]) -> Any:
    """Return the device to measure on, or None."""
    if len(platforms) != 1 or jax.process_count() > 1:
        return None
    try:
        device = jax.local_devices(backend=platforms[0])[0]
    except RuntimeError:
        return None
    return device if device in jax.local_devices() else None


def _measure(runs: ConvolutionOfRuns, device: Any) -> dict[str, float]:
    """Measure the milliseconds of each way that the device can run."""
    rng, found = np.random.default_rng(0), {}
    with jax.enable_x64(runs.dtype.itemsize == 8):
        a, b = (
            jax.device_put(rng.standard_normal(shape, np.float32).astype(runs.dtype), device)
            for shape in runs.shapes
        )
        for each in WAYS:
            try:
                form = jax.jit(of_runs(runs.name, each, runs.window))
                found[each] = 1e3 * _seconds(lambda form=form: form(a, b))
            except jax.errors.JaxRuntimeError:  # too little memory, or no program
                continue
    return found


def _seconds(call: Callable[[], Any]) -> float:
    """Return the least of three mean times of calls in a row, which a device queues."""

    def mean(calls: int) -> float:
        begin, out = time.perf_counter(), None
        for _ in range(calls):
            out = call()
        jax.block_until_ready(out)
        return (time.perf_counter() - begin) / calls

    mean(1)
    calls = max(1, min(10, round(_SECONDS / mean(1))))
    return min(mean(calls) for _ in range(3))
