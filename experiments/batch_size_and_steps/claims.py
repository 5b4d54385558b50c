"""What the saved steps of `batch_size_and_steps` say, and the verdicts."""

import numpy as np
import xarray as xr

from optjax.batch_size.regimes import Regime
from optjax.report.claims import Claim, verdict, with_interval
from optjax.report.rendering import number

NEEDS = "narrower intervals: 'optjax run batch_size_and_steps --seeds 16 --net-seeds 10'"
"""Of a claim that the intervals leave undecided."""
PROBLEMS = {
    "quadratic": "noisy quadratic, exact",
    "squares": "least squares",
    "net": "ConvTransposeNet",
}
OPTIMISERS = ("SGD", "momentum", "Adam", "preconditioned")
PRECONDITIONED = {"quadratic": "h^−½ SGD", "squares": "Newton", "net": "Muon"}


def of(dataset: xr.Dataset, problem: str, optimiser: str, name: str) -> np.ndarray | None:
    """A variable of a problem and optimiser; None where it was not measured."""
    key = f"{problem}_{optimiser}_{name}"
    return dataset[key].values if key in dataset else None


def series(
    dataset: xr.Dataset, problem: str, optimiser: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Batch sizes that reach the target, the steps, and their 95 % intervals (2, B)."""
    steps = of(dataset, problem, optimiser, "steps")
    if steps is None:
        return np.empty(0), np.empty(0), np.empty((2, 0))
    sizes = dataset[f"{problem}_batch_size"].values
    good = np.isfinite(steps)
    ends = of(dataset, problem, optimiser, "steps_interval")
    ends = np.stack([steps, steps]) if ends is None else ends.T
    return sizes[good], steps[good], ends[:, good]


def faster(
    dataset: xr.Dataset, problem: str, optimiser: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """How many times fewer steps than SGD's, where both reach the target, with 95 % intervals."""
    sizes, sgd, ends = series(dataset, problem, "SGD")
    others, steps, other_ends = series(dataset, problem, optimiser)
    both = np.intersect1d(sizes, others)
    i, j = np.searchsorted(sizes, both), np.searchsorted(others, both)
    log = np.log(sgd[i] / steps[j])
    # Different runs: the halves of the intervals add up as independent errors do.
    down = np.hypot(np.log(sgd[i] / ends[0, i]), np.log(other_ends[1, j] / steps[j]))
    up = np.hypot(np.log(ends[1, i] / sgd[i]), np.log(steps[j] / other_ends[0, j]))
    return both, np.exp(log), np.exp(np.stack([log - down, log + up]))


def doubling(dataset: xr.Dataset, problem: str, which: int) -> tuple[float, list[float] | None]:
    """How many times fewer steps a doubled batch takes SGD, at the smallest or largest batch."""
    sizes, _, _ = series(dataset, problem, "SGD")
    all_sizes = dataset[f"{problem}_batch_size"].values
    at = int(np.flatnonzero(all_sizes == sizes[which])[0])
    slope = of(dataset, problem, "SGD", "slope")
    ends = of(dataset, problem, "SGD", "slope_interval")
    assert slope is not None
    interval = None if ends is None else sorted((2.0 ** -ends[at]).tolist())
    return float(2.0 ** -slope[at]), interval


def regimes(dataset: xr.Dataset, problem: str) -> tuple[np.ndarray, np.ndarray]:
    """Batch sizes, and SGD's regime at each."""
    named = of(dataset, problem, "SGD", "regime")
    sizes = dataset[f"{problem}_batch_size"].values
    assert named is not None
    known = np.isfinite(named) & (named >= 0)
    return sizes[known], named[known].astype(int)


def claims(dataset: xr.Dataset) -> list[Claim]:
    """batch-size/critical, batch-size/noise-regime and batch-size/curvature-regime."""
    runs = sum(v.size for name, v in dataset.data_vars.items() if str(name).endswith("_censored"))
    return [_critical(dataset, runs), _noise(dataset, runs), _curvature(dataset, runs)]


def _critical(dataset: xr.Dataset, runs: int) -> Claim:
    measured, interval, knees, ends_right, shorts = {}, {}, [], [], []
    for problem, title in PROBLEMS.items():
        sizes, named = regimes(dataset, problem)
        B_crit = float(dataset[f"{problem}_SGD_B_crit"])
        ends = of(dataset, problem, "SGD", "B_crit_interval")
        measured[f"{title}: B_crit"] = B_crit
        interval[f"{title}: B_crit"] = None if ends is None else ends.tolist()
        shorts.append(f"{with_interval(B_crit, ends, 2)} ({problem})")
        for which, word in ((0, "smallest"), (-1, "largest")):
            name = f"{title}: factor saved by a doubling at the {word} batch"
            measured[name], interval[name] = doubling(dataset, problem, which)
        measured[f"{title}: regimes"] = ", ".join(
            f"{b:,.0f}: {Regime(k).name.lower()}" for b, k in zip(sizes, named, strict=True)
        )
        knees.append(sizes[0] < B_crit < sizes[-1])
        ends_right.append(named[0] == Regime.NOISE and named[-1] == Regime.CURVATURE)
    return Claim(
        id="batch-size/critical",
        statement="Each doubling of the batch halves the steps to a target at first, then it buys "
        "almost nothing; the efficient batch is at the knee between.",
        source="steps against batch size: a noise-dominated part of slope −1, a knee, a flat part",
        measured=measured,
        tolerance="on every problem: SGD's slope d log S/d log B below −¾ at the smallest batch "
        "that reaches the target and above −¼ at the largest, and B_crit between them",
        n_runs=runs,
        interval=interval,
        verdict=verdict(all(knees) and all(ends_right), reasoning=all(knees)),
        evidence="batch_size_and_steps/steps",
        plain_words="A doubled batch halves the steps, then buys almost nothing",
        source_short="slope −1, a knee, a flat part",
        measured_short=f"knee at {', '.join(shorts)}",
    )


def _noise(dataset: xr.Dataset, runs: int) -> Claim:
    measured, interval, halves, against, shorts = {}, {}, [], [], []
    for problem, title in PROBLEMS.items():
        sizes, steps, ends = series(dataset, problem, "SGD")
        known, named = regimes(dataset, problem)
        noisy = np.isin(sizes, known[named == Regime.NOISE])
        last = max(1, int(noisy.sum()) - 1)
        doublings = np.log2(sizes[last] / sizes[0])
        name = f"{title}: times fewer steps a doubling, B = {sizes[0]:,.0f} to {sizes[last]:,.0f}"
        log = np.log(steps[0] / steps[last])
        down = np.hypot(np.log(steps[0] / ends[0, 0]), np.log(ends[1, last] / steps[last]))
        up = np.hypot(np.log(ends[1, 0] / steps[0]), np.log(steps[last] / ends[0, last]))
        factor, low, high = (float(np.exp(x / doublings)) for x in (log, log - down, log + up))
        measured[name] = factor
        interval[name] = None if problem == "quadratic" else [low, high]
        shorts.append(f"× {with_interval(factor, interval[name], 2)}")
        halves.append(noisy.any() and factor > 1.5 and low > 1)
        against.append(not noisy.any() or high < 1.5)
    outcome = _decided(halves, against)
    return Claim(
        id="batch-size/noise-regime",
        statement="Where noise dominates, parallel compute (a larger batch) accelerates training.",
        source="in the noise-dominated regime doubling the batch halves the steps",
        measured=measured,
        tolerance="on every problem, over SGD's noise-dominated batch sizes, a doubling saves a "
        "factor of more than 1.5 (2 is perfect), its 95 % interval above 1; refuted where the "
        "interval of one is below 1.5; else undecided, as not run",
        n_runs=runs,
        interval=interval,
        verdict=outcome,
        evidence="batch_size_and_steps/steps",
        plain_words="While noise dominates, a larger batch speeds up training",
        source_short="each doubling halves the steps",
        measured_short=f"a doubling saves {', '.join(shorts)}",
        needs=NEEDS,
    )


def _decided(good: list[bool], against: list[bool]) -> str:
    """A verdict where the intervals allow one; too few seeds refute nothing."""
    return verdict(all(good)) if all(good) or any(against) else "not run"


def _curvature(dataset: xr.Dataset, runs: int) -> Claim:
    measured, interval, flat, helped, against, shorts = {}, {}, [], [], [], []
    most = 0.0
    for problem, title in PROBLEMS.items():
        size = series(dataset, problem, "SGD")[0][-1]
        name = f"{title}: times fewer steps from doubling B = {size:,.0f}"
        factor, ends = doubling(dataset, problem, -1)
        measured[name], interval[name] = factor, ends
        most = max(most, factor)
        flat.append(factor < 1.2)
        against.append((ends or [factor])[0] > 1.2)
        best = PRECONDITIONED[problem]
        sizes, factors, spans = faster(dataset, problem, "preconditioned")
        for which in (0, -1):
            name = f"{title}: times fewer steps by {best} at B = {sizes[which]:,.0f}"
            measured[name] = float(factors[which])
            interval[name] = None if problem == "quadratic" else spans[:, which].tolist()
        shorts.append(f"× {with_interval(measured[name], interval[name], 2)}")
        helped.append(spans[0, -1] > 1)
        against.append(spans[1, -1] < 1)
    outcome = _decided([*flat, *helped], against)
    return Claim(
        id="batch-size/curvature-regime",
        statement="Where curvature dominates, a larger batch does not accelerate training; a "
        "second-order or better preconditioned optimiser does.",
        source="in the curvature-dominated regime second-order methods help, parallel compute does "
        "not",
        measured=measured,
        tolerance="on every problem, at the largest batch: another doubling saves less than a "
        "factor 1.2, and the preconditioned optimiser saves one above 1 (95 % interval); refuted "
        "where an interval says the contrary; else undecided, as not run",
        n_runs=runs,
        interval=interval,
        verdict=outcome,
        evidence="batch_size_and_steps/remedies",
        plain_words="Where curvature dominates, only second-order steps help",
        source_short="second-order steps, not larger batches",
        measured_short=f"≤ × {number(most, 2)} by doubling; {', '.join(shorts)}",
        needs=NEEDS,
    )
