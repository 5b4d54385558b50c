"""A least-squares run: its gradients, and the time to compile it."""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optjax.run.problems import least_squares
from optjax.run.trajectory import Run, make_run
from optjax.support.types import Array, Key

from .measure import Entry, Side, seconds


class LeastSquaresSizes(NamedTuple):
    """What is run: n examples of d numbers, T steps on batches."""

    n: int = 32
    d: int = 64
    steps: int = 1000
    batch_size: int = 8

    def __str__(self) -> str:
        return f"n = {self.n}, d = {self.d}, {self.steps} steps, batch {self.batch_size}"


QUICK = LeastSquaresSizes(n=8, d=6, steps=40, batch_size=4)


def entries(sizes: LeastSquaresSizes) -> list[Entry]:
    """The gradients and the compile time."""
    return [
        Entry(
            "gradient",
            f"derivative of the final loss by the learning rate ({sizes})",
            "ms",
            "run",
            lambda _: _gradient(sizes),
        ),
        Entry(
            "compile/least-squares",
            f"trace and compile a least-squares run ({sizes})",
            "s",
            "make_run",
            lambda _: _compile(sizes),
        ),
    ]


def _data(sizes: LeastSquaresSizes) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    X = rng.normal(size=(sizes.n, sizes.d)).astype(np.float32)
    return X, rng.normal(size=sizes.n).astype(np.float32)


def _rate(sizes: LeastSquaresSizes) -> float:
    """A tenth of 1/max‖x‖²: no mini-batch, of any size, diverges up to the whole of it."""
    X = _data(sizes)[0]
    return float(0.1 / np.max(np.sum(X**2, axis=1)))


def _run(sizes: LeastSquaresSizes) -> tuple[Run, float]:
    problem = least_squares(*_data(sizes))
    run = make_run(
        problem,
        optax.sgd,
        steps=sizes.steps,
        max_batch_size=sizes.batch_size,
        record_every=sizes.steps,
    )
    return run, _rate(sizes)


def _by_hand(sizes: LeastSquaresSizes) -> Callable[[Array, Key], Array]:
    """The same run as one writes it with optax alone: the final loss."""
    X, t = (jnp.asarray(a) for a in _data(sizes))

    def run(rate: Array, key: Key) -> Array:
        tx = optax.sgd(rate)

        def step(carry, k):
            w, state = cast(tuple[Array, optax.OptState], carry)
            picks = jax.random.randint(jax.random.fold_in(key, k), (sizes.batch_size,), 0, sizes.n)
            grad = jax.grad(lambda w: jnp.mean((X[picks] @ w - t[picks]) ** 2))(w)
            updates, state = tx.update(grad, state, w)
            return (w + cast(Array, updates), state), None

        w0 = jnp.zeros(sizes.d)
        (w, _), _ = jax.lax.scan(step, (w0, tx.init(w0)), jnp.arange(sizes.steps))
        return jnp.mean((X @ w - t) ** 2)

    return run


def _gradient(sizes: LeastSquaresSizes) -> list[Side]:
    run, rate = _run(sizes)
    at, one = jnp.asarray(rate, jnp.float32), jnp.ones((), jnp.float32)
    key = jax.random.key(0)

    def loss(rate: Array, key: Key) -> Array:
        return run({"learning_rate": rate}, key).final_loss

    plain = jax.jit(loss)
    reverse = jax.jit(jax.value_and_grad(loss))
    forward = jax.jit(lambda rate, key: jax.jvp(lambda r: loss(r, key), (rate,), (one,)))
    calls = {
        "run": lambda: plain(at, key),
        "jax.grad": lambda: reverse(at, key),
        "jax.jvp": lambda: forward(at, key),
    }
    return _warm(calls, 1000)


def _warm(calls: dict[str, Callable], factor: float) -> list[Side]:
    """Sides that repeat short calls for 50 ms: the first after a pause finds cold caches."""
    sides = []
    for name, call in calls.items():
        jax.block_until_ready(call())
        count = math.ceil(0.05 / max(seconds(call), 1e-6))
        sides.append(Side(name, partial(_mean_time, call, count, factor)))
    return sides


def _mean_time(call: Callable, count: int, factor: float) -> float:
    return factor / count * seconds(lambda: [jax.block_until_ready(call()) for _ in range(count)])


def _compile(sizes: LeastSquaresSizes) -> list[Side]:
    def ours() -> Callable:
        run, rate = _run(sizes)
        return lambda: run({"learning_rate": rate}, jax.random.key(0))

    def hand() -> Callable:
        run = jax.jit(_by_hand(sizes))
        rate = _rate(sizes)
        return lambda: run(rate, jax.random.key(0))

    ready = [
        Side("make_run", lambda: first_call(ours)),
        Side("scan by hand with optax", lambda: first_call(hand)),
    ]
    for side in ready:
        side.measure()  # the first compilation of a process also loads the compiler
    return ready


def first_call(make: Callable[[], Callable]) -> float:
    """Seconds that a program's first call takes above its second, nothing cached."""
    jax.clear_caches()
    call = make()
    first = seconds(call)
    return first - seconds(call)
