"""Fits of a scaling law by the published objective: Huber of log residuals, from many starts."""

import itertools
from typing import Any, NamedTuple

import jax
import numpy as np

from optjax.scaling.forms import Form, form_of, huber
from optjax.scaling.minimise import Minima, Progress, minimise
from optjax.scaling.table import Runs
from optjax.support.console import silent
from optjax.support.errors import UserError, whole

DELTA = 1e-3
_STARTS = 96  # points of the grid, those of least objective, to minimise from
_WHAT = {"N": "model sizes N", "D": "data sizes D", "S": "numbers of steps S"}


class Fit(NamedTuple):
    """A law fitted to runs."""

    form: Form
    law: Any  # Hoffmann, Power, KaplanND or KaplanNS, each field a float
    objective: float  # Σ Huber_δ(log L − log measured)
    runs: Runs  # to which the law was fitted
    theta: np.ndarray  # (p,) the minimiser's parameters
    means: np.ndarray  # (k,) of the log sizes
    residuals: np.ndarray  # (n,) log measured − log L
    delta: float
    converged: bool
    starts: int  # minimised
    agreeing: float  # share of the starts that ended at this objective


def logs(form: Form, points: Runs) -> np.ndarray:
    """Return the logarithms of a law's sizes, (k, n)."""
    return np.log(np.stack([getattr(points, size) for size in form.sizes]))


def drop_highest(points: Runs, count: int) -> Runs:
    """Drop the runs of the `count` highest losses.

    >>> from optjax.scaling.table import runs
    >>> drop_highest(runs([3.0, 9.0, 2.0], N=[1.0, 2.0, 3.0]), 1).loss.tolist()
    [3.0, 2.0]
    """
    count = whole("drop_highest", count, 0)
    if count >= len(points.loss):
        raise UserError(
            f"drop_highest is {count} of {len(points.loss)} runs: expected fewer, so that some stay"
        )
    order = np.argsort(points.loss, kind="stable")
    return points.take(np.sort(order[: len(order) - count]))


def check(form: Form, points: Runs) -> None:
    """Check that the runs can tell the law's parameters apart.

    Raises:
      UserError: a size is not known; fewer than p + 1 runs; a size with too few different values;
        sizes that always grow together.
    """
    n, least = len(points.loss), form.parameters + 1
    for size in form.sizes:
        if getattr(points, size) is None:
            raise UserError(f"the law {form.name!r} needs {_WHAT[size]}: the runs have none")
    if n < least:
        raise UserError(
            f"{n} runs: the law {form.name!r} has {form.parameters} parameters and needs at least "
            f"{least} runs"
        )
    z = logs(form, points)
    many = 2 + (form.floor and len(form.sizes) == 1)
    for size, x in zip(form.sizes, z, strict=True):
        values = len(np.unique(x))
        if values < many:
            have = "all are equal" if values == 1 else f"only {values} are different"
            raise UserError(
                f"of the {_WHAT[size]} {have}: the law {form.name!r} needs at least {many} "
                "different values to find its exponent"
            )
    if len(z) == 2 and abs(np.corrcoef(z)[0, 1]) > 1 - 1e-9:
        one, two = form.sizes[0], form.sizes[-1]
        raise UserError(
            f"{one} and {two} follow each other exactly: their exponents cannot be told apart; "
            f"vary one with the other fixed, or fit power-{one.lower()}"
        )
    if np.ptp(points.loss) == 0:
        raise UserError("all losses are equal: there is no law to find in them")


def grid(form: Form, z: np.ndarray, y: np.ndarray, means: np.ndarray) -> np.ndarray:
    """Make the starts of the minimiser, (starts, p).

    All splits of the median loss between the terms, with all pairs of exponents. For Hoffmann's law
    also its authors' grid: a, b in 0, 5, …, 25, e in −1, −½, …, 1, α, β in 0, ½, …, 2.
    """
    level, k = float(np.median(y)), len(z)
    exponents = (0.02, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6)
    shares = (0.05, 0.2, 0.5, 0.8, 0.95)
    starts: list[tuple[float, ...]] = []
    for floor in (0.02, 0.2, 0.5, 0.8, 0.95) if form.floor else (0.0,):
        for share in shares if k == 2 else (1.0,):
            parts = [(1 - floor) * share, (1 - floor) * (1 - share)][:k]
            a = [level + np.log(part) for part in parts]
            e = [level + np.log(floor)] if form.floor else []
            starts += [(*a, *e, *alpha) for alpha in itertools.product(exponents, repeat=k)]
    found = np.array(starts)
    if form.name == "kaplan-nd":
        # In this law each term is a share of L^(1/α_D).
        for i, share in ((0, found[:, :1]), (1, found[:, 1:2])):
            found[:, i : i + 1] = level + found[:, 3:] * (share - level)
    if form.name == "hoffmann":
        ab, e, exponent = np.arange(0, 26, 5.0), np.arange(-1, 1.1, 0.5), np.arange(0, 2.1, 0.5)
        theirs = np.array(list(itertools.product(ab, ab, e, exponent, exponent)))
        theirs[:, :2] -= theirs[:, 3:] * means
        found = np.concatenate([found, theirs])
    return found


def prepared(
    form: Form, points: Runs, delta: float, count: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return the means of the log sizes, z, y, and the best starts of the grid, (count, p)."""
    if not delta > 0:
        raise UserError(f"delta is {delta!r}: expected a number above 0")
    z, y = logs(form, points), np.log(points.loss)
    means = z.mean(axis=1)
    z = z - means[:, None]
    starts = grid(form, z, y, means)
    best = np.argsort(values(form, starts, z, y, delta), kind="stable")[:count]
    return means, z, y, starts[best]


def values(form: Form, theta: np.ndarray, z: np.ndarray, y: np.ndarray, delta: float) -> np.ndarray:
    """Evaluate the objective at each θ, (starts,)."""
    with jax.enable_x64(True):
        at = jax.vmap(lambda t: huber(form.log_loss(t, z) - y, delta).sum())
        found = np.asarray(jax.jit(lambda theta: jax.lax.map(at, theta))(theta[None])[0])
    return np.where(np.isfinite(found), found, np.inf)


def objective(points: Runs, law: Any, name: str = "hoffmann", *, delta: float = DELTA) -> float:
    """Compute the objective of a law on runs; less is better.

    Σ Huber_δ(log L − log measured)

    Args:
      points: the runs.
      law: the parameters, as in `optjax.scaling.laws`.
      name: name of the law.
      delta: δ.

    >>> from optjax.scaling.laws import HOFFMANN_2022, hoffmann_loss
    >>> from optjax.scaling.table import runs
    >>> N, D = np.array([1e8, 1e9]), np.array([1e10, 1e10])
    >>> exact = runs(hoffmann_loss(HOFFMANN_2022, N, D), N, D)
    >>> objective(exact, HOFFMANN_2022) < 1e-12
    True

    Source: Hoffmann et al. 2022 (arXiv:2203.15556), equation 3.
    """
    form = form_of(name)
    with jax.enable_x64(True):
        r = np.log(form.loss(law, *np.exp(logs(form, points)))) - np.log(points.loss)
        return float(np.sum(np.asarray(huber(r, delta))))


def fit(
    points: Runs, law: str = "hoffmann", *, delta: float = DELTA, progress: Progress = silent
) -> Fit:
    """Fit a scaling law to runs.

    min Σ Huber_δ(log L(sizes) − log loss), δ = 1e-3, the log of a sum of powers by log-sum-exp

    Args:
      points: the runs; `drop_highest` leaves outliers out.
      law: "hoffmann", "kaplan-nd", "kaplan-ns" (its S is S_min), "power-n", "power-d", or
        "power-n-floor", "power-d-floor" with an irreducible loss.
      delta: δ, the log residual from where on a run counts linearly.
      progress: called with a text and the share done.

    Returns:
      The law and how it was found, in float64 whatever the precision of the process. The objective
      is evaluated at every point of a grid of starts and minimised from the best 96; `agreeing`
      says how many of these ended at the same least value.

    Raises:
      UserError: too few runs, or runs that cannot tell the parameters apart.

    >>> from optjax.scaling.laws import Power, power_loss
    >>> from optjax.scaling.table import runs
    >>> N = np.geomspace(1e6, 1e9, 8)
    >>> found = fit(runs(power_loss(Power(8.8e13, 0.076), N), N), "power-n")
    >>> round(found.law.exponent, 6)
    0.076

    Source: Hoffmann et al. 2022 (arXiv:2203.15556), section 3.3 and appendix D.2.
    """
    form = form_of(law)
    check(form, points)
    means, z, y, starts = prepared(form, points, delta, _STARTS)
    ones = np.ones((len(starts), len(y)))
    ends = minimise(
        *(form, z, y, lambda first, count: ones[:count], starts),
        delta=delta, progress=progress, text="starts",
    )  # fmt: skip
    return _best(form, points, means, z, ends, delta)


def _best(
    form: Form, points: Runs, means: np.ndarray, z: np.ndarray, ends: Minima, delta: float
) -> Fit:
    """Make a `Fit` from the least of the minima."""
    least = int(np.argmin(np.where(np.isfinite(ends.objective), ends.objective, np.inf)))
    theta, value = ends.theta[least], float(ends.objective[least])
    with jax.enable_x64(True):
        residuals = np.log(points.loss) - np.asarray(form.log_loss(theta, z))
    law = form.kind(*map(float, form.to_law(theta, means)))
    # On exact data the objectives are rounding errors, which are no disagreement.
    same = ends.objective <= value * (1 + 1e-6) + 1e-20
    return Fit(
        *(form, law, value, points, theta, means, residuals, delta),
        *(bool(ends.converged[least]), len(ends.theta), float(np.mean(same))),
    )


def doubts(found: Fit) -> list[str]:
    """List, a line each, why the intervals of a fit may say less than they seem to.

    * **Not determined.** With J the derivatives of the log losses by the logs of the scales and by
      the exponents (in units of themselves), J = U S Vᵀ, and σ the residuals' standard deviation,
      the standard error along the direction vᵢ is σ/sᵢ. Above ½ the runs do not determine it.
    * **Repeated rows**, which a bootstrap takes for independent runs.

    >>> from optjax.scaling.laws import HOFFMANN_2022, hoffmann_loss
    >>> from optjax.scaling.table import runs
    >>> rng = np.random.default_rng(0)
    >>> N = np.geomspace(1e7, 1e9, 12)
    >>> D = 20 * N * np.exp(0.01 * rng.normal(size=12))  # nearly in proportion
    >>> noisy = hoffmann_loss(HOFFMANN_2022, N, D) * np.exp(0.005 * rng.normal(size=12))
    >>> doubts(fit(runs(noisy, N, D)))[0][:36]
    'the runs do not determine log A, log'

    Source: Seber and Wild, Nonlinear Regression (2003), section 3.
    """
    form, n = found.form, len(found.runs.loss)
    z = logs(form, found.runs)
    with jax.enable_x64(True):
        slopes = jax.jacfwd(lambda theta: form.log_loss(theta, z - found.means[:, None]))
        J = np.asarray(slopes(np.asarray(found.theta)))
    k = len(form.sizes)
    scale = np.ones(form.parameters)
    scale[-k:] = np.maximum(np.abs(found.theta[-k:]), 0.05)
    _, s, V = np.linalg.svd(J * scale, full_matrices=True)
    s = np.concatenate([s, np.zeros(form.parameters - len(s))])
    sigma = float(np.sqrt(np.sum(found.residuals**2) / max(1, n - form.parameters)))
    with np.errstate(divide="ignore", invalid="ignore"):
        weak = np.where(s > 0, sigma / s, np.inf if sigma > 0 else 0.0) > 0.5
    lines = []
    if weak.any():
        part = np.sqrt(np.sum(V[weak] ** 2, axis=0))
        loose = part > 0.2
        named = _names(form)
        free = ", ".join(name for name, one in zip(named, loose, strict=True) if one)
        rest = ", ".join(name for name, one in zip(named, loose, strict=True) if not one)
        along = " ".join(
            f"{v:+.2f} {name}" for name, v in zip(named, V[-1], strict=True) if abs(v) > 0.2
        )
        lines.append(
            f"the runs do not determine {free} one by one: a move along {along} (exponents in "
            "units of themselves) changes no loss by more than the noise. What they determine are "
            f"the combinations across it{f', and {rest}' if rest else ''}. Vary the sizes apart "
            "from each other, and over a wider range"
        )
    rows = np.vstack([z, found.runs.loss]).T
    repeated = n - len(np.unique(rows, axis=0))
    if repeated:
        lines.append(
            f"{repeated} of {n} rows repeat another one: intervals take them for runs of their own "
            "and are too narrow; leave the repeats out"
        )
    return lines


def _names(form: Form) -> list[str]:
    """Name the parameters of the fit: logs of scales, of the floor, exponents."""
    if form.powers == 1:
        return ["log of the scale", *(["log E"] if form.floor else []), "the exponent"]
    if form.powers == 2:
        return ["log A", "log B", *(["log E"] if form.floor else []), "alpha", "beta"]
    return [f"parameter {i + 1} of {form.name}" for i in range(form.parameters)]
