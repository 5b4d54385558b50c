"""The uncertainty of a fitted law: refits to resampled runs, all at once.

A resample of n runs is a vector of counts: the same runs, each weighted by how often it was drawn.
So all refits share the runs, the program and the start: the fit to all runs. Each keeps only its θ.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optjax.scaling.fit import Fit, logs
from optjax.scaling.minimise import Progress, minimise
from optjax.support.console import silent
from optjax.support.errors import UserError, whole
from optjax.support.keys import make_key
from optjax.support.types import Array, Key


class Interval(NamedTuple):
    """A value, its 95 % percentile interval and its standard error."""

    value: float
    low: float
    high: float
    error: float  # standard deviation over the resamples


class Bootstrap(NamedTuple):
    """Refits to resampled runs."""

    fit: Fit
    law: Any  # as the fit's, each field (resamples,)
    theta: np.ndarray  # (resamples, p)
    objective: np.ndarray  # (resamples,)
    failed: int  # resamples that had no minimum, left out


@functools.partial(jax.jit, static_argnums=(2, 3))
def _counts(key: Key, first: Array, count: int, n: int) -> Array:
    """Count how often each of n runs is drawn in resamples first, …, first + count − 1."""

    def one(i: Array) -> Array:
        drawn = jax.random.randint(jax.random.fold_in(key, i), (n,), 0, n, jnp.int32)
        return jnp.zeros(n, jnp.int32).at[drawn].add(1)

    return jax.vmap(one)(first + jnp.arange(count, dtype=jnp.int32))


def counts(key: Key, first: int, count: int, n: int) -> np.ndarray:
    """Count how often each of n runs is drawn in each of `count` resamples.

    Resample i is the same however many others are drawn, and in float32 and float64.

    Args:
      key: of all resamples.
      first: number of the first resample.
      count: resamples.
      n: runs.

    Returns:
      (count, n) int32, each row summing to n.

    >>> counts(jax.random.key(0), 0, 2, 5).sum(axis=1).tolist()
    [5, 5]
    """
    # Rounded up to a power of two, so that few programs serve all counts.
    return np.asarray(_counts(key, np.int32(first), 1 << (count - 1).bit_length(), n))[:count]


def bootstrap(
    found: Fit, resamples: int = 4000, key: Key | None = None, *, progress: Progress = silent
) -> Bootstrap:
    """Refit a law to resampled runs.

    Args:
      found: the fit to all runs, where each refit starts.
      resamples: how many; only the results take memory in proportion.
      key: of the resamples; jax.random.key(0) if None.
      progress: called with a text and the share done.

    Returns:
      The refits, in float64. A resample of too few different runs may have no minimum, and is left
      out; `failed` counts these.

    Raises:
      UserError: fewer than 2 resamples, or none with a minimum.

    >>> from optjax.scaling.fit import fit
    >>> from optjax.scaling.table import runs
    >>> N = np.geomspace(1e6, 1e9, 8)
    >>> noisy = runs(5 * N**-0.1 * np.exp(0.01 * np.cos(9 * N)), N)
    >>> refits = bootstrap(fit(noisy, "power-n"), 50)
    >>> intervals(refits)["exponent"].low < 0.1 < intervals(refits)["exponent"].high
    True

    Source: Besiroglu et al. 2024 (arXiv:2404.10102), who drew 4,000.
    """
    resamples = whole("resamples", resamples, 2)
    key = make_key(0) if key is None else key
    n = len(found.runs.loss)
    z = logs(found.form, found.runs) - found.means[:, None]
    starts = np.broadcast_to(found.theta, (resamples, len(found.theta)))
    ends = minimise(
        *(found.form, z, np.log(found.runs.loss), lambda i, k: counts(key, i, k, n), starts),
        delta=found.delta, progress=progress, text="resamples",
    )  # fmt: skip
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        law = found.form.to_law(ends.theta, found.means)
        kept = ends.converged & np.all([np.isfinite(x) for x in law], axis=0)
    if not kept.any():
        raise UserError(
            f"none of {resamples} resamples of {n} runs has a minimum: the law "
            f"{found.form.name!r} needs more runs, or has too many parameters for them"
        )
    law = found.form.kind(*(x[kept] for x in law))
    return Bootstrap(found, law, ends.theta[kept], ends.objective[kept], int(np.sum(~kept)))


def interval(value: Any, samples: np.ndarray) -> Interval:
    """Return the 95 % percentile interval of a value, from its values over the resamples.

    >>> interval(2.0, np.arange(101.0)).low
    2.5
    """
    # The scale of a law that the runs hardly identify may overflow.
    with np.errstate(all="ignore"):
        low, high = np.percentile(samples, [2.5, 97.5])
        error = float(np.std(samples, ddof=1)) if len(samples) > 1 else float("nan")
    return Interval(float(value), float(low), float(high), error)


def falling(refits: Bootstrap) -> Bootstrap | None:
    """Keep the refits whose loss falls with every size: only such a law has a best budget use.

    None where the loss of the fit itself does not fall, or that of fewer than two refits does.
    """

    def falls(law: Any) -> Any:
        names = [n for n in law._fields if n.startswith(("alpha", "beta", "exponent"))]
        return np.all([np.asarray(getattr(law, name)) > 0 for name in names], axis=0)

    kept = falls(refits.law)
    if not falls(refits.fit.law) or np.sum(kept) < 2:
        return None
    law = refits.fit.form.kind(*(np.asarray(x)[kept] for x in refits.law))
    return refits._replace(law=law, theta=refits.theta[kept], objective=refits.objective[kept])


def intervals(refits: Bootstrap) -> dict[str, Interval]:
    """Return the 95 % interval and standard error of every parameter, and of Hoffmann's a and b.

    N_opt ∝ C^a and D_opt ∝ C^b, a = β/(α + β), b = α/(α + β)
    """
    pairs = zip(refits.fit.law._fields, refits.fit.law, refits.law, strict=True)
    found = {name: interval(value, samples) for name, value, samples in pairs}
    if refits.fit.form.name == "power-n" or refits.fit.form.name == "power-d":
        del found["E"]
    if refits.fit.form.name == "hoffmann":
        law, many = refits.fit.law, refits.law
        found["a"] = interval(
            law.beta / (law.alpha + law.beta), many.beta / (many.alpha + many.beta)
        )
        found["b"] = interval(
            law.alpha / (law.alpha + law.beta), many.alpha / (many.alpha + many.beta)
        )
    return found


def predictions(refits: Bootstrap, *sizes: Any) -> np.ndarray:
    """Predict the loss by each refit, (resamples, points).

    Args:
      refits: from `bootstrap`.
      sizes: (points,) for each of the law's sizes, in its order.
    """
    form, fields = refits.fit.form, refits.law
    columns = form.kind(*(np.asarray(x)[:, None] for x in fields))
    with jax.enable_x64(True):
        return np.asarray(form.loss(columns, *(np.asarray(x, float)[None, :] for x in sizes)))
