"""Over-parameterised data that tell optimisers apart."""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


class DataSet(NamedTuple):
    """Equations Xw = t with more unknowns than rows, and points held out."""

    name: str
    X: Floats  # (n, d)
    t: Floats  # (n,)
    X_test: Floats  # (m, d); m = 0 where there is nothing to predict
    t_test: Floats  # (m,)
    labels: bool = False  # whether t is −1 or 1, and a test error the share of wrong signs
    shape: tuple[int, ...] = ()  # of the weights, where they are no vector

    def error(self, w: Floats) -> float:
        """Return the test error: the share of wrong signs, or ‖X_test w − t_test‖ / ‖t_test‖."""
        if not len(self.t_test):
            return math.nan
        found = self.X_test @ w
        if self.labels:
            return float(np.mean(found * self.t_test <= 0))
        return float(np.linalg.norm(found - self.t_test) / np.linalg.norm(self.t_test))


def _untested(name: str, X: list[list[float]], t: list[float]) -> DataSet:
    A = np.array(X)
    return DataSet(name, A, np.array(t), np.zeros((0, A.shape[1])), np.zeros(0))


SOURCE = _untested("the source's", [[2.0, 1.0]], [2.0])
ONE_EQUATION = _untested("one equation", [[1.0, 2.0]], [1.0])
TWO_EQUATIONS = _untested("two equations", [[1.0, 1.0, 1.0], [1.0, 2.0, 0.0]], [1.0, 10.0])
"""The last two are Gunasekar et al. 2018's."""


def wilson(plus: int, minus: int, tested: int = 0) -> DataSet:
    """The data of Wilson et al. 2017, section 3.3, in the order +, −, and new points in turn.

    x₁ = y, x₂ = x₃ = 1, then one feature of its own if y = 1, five if y = −1. The features that
    only new points have are left out: their weights stay 0.

    >>> wilson(1, 1).X.tolist()
    [[1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0], [-1.0, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0]]
    """
    y = np.r_[np.ones(plus), -np.ones(minus), np.where(np.arange(tested) % 2, -1.0, 1.0)]
    own = np.where(y > 0, 1, 5)
    X = np.zeros((len(y), 3 + own.sum()))
    X[:, 0], X[:, 1:3] = y, 1
    for i, (first, count) in enumerate(zip(3 + np.cumsum(own) - own, own, strict=True)):
        X[i, first : first + count] = 1
    n = plus + minus
    X = X[:, : 3 + own[:n].sum()]
    return DataSet("Wilson's", X[:n], y[:n], X[n:], y[n:], labels=True)


def wilson_margins(plus: int, minus: int) -> tuple[float, float]:
    """Return xᵀw* of new points with y = 1 and −1, by formula.

    w* = Xᵀα, α₊ = (4n₋ + 5)/D, α₋ = −(4n₊ + 1)/D, D = 8n₊n₋ + 15n₊ + 3n₋ + 5; with the features
    that all points share, w*₁ = n₊α₊ − n₋α₋ and w*₂ = w*₃ = n₊α₊ + n₋α₋.

    >>> [round(margin, 3) for margin in wilson_margins(6, 4)]
    [0.93, -0.582]
    """
    D = 8 * plus * minus + 15 * plus + 3 * minus + 5
    up, down = (4 * minus + 5) / D, -(4 * plus + 1) / D
    first, other = plus * up - minus * down, plus * up + minus * down
    return first + 2 * other, -first + 2 * other


def gaussian(
    name: str, n: int, w: Floats, spectrum: Floats, seed: int, tested: int = 200
) -> DataSet:
    """Draw X = UΣVᵀ with U and V uniform, Σ as given, t = Xw, and new points x ~ N(0, VΣ²Vᵀ/n)."""
    rng = np.random.default_rng(seed)
    U, _ = np.linalg.qr(rng.normal(size=(n, n)))
    V, _ = np.linalg.qr(rng.normal(size=(len(w), len(w))))
    rest = np.full(len(w) - n, spectrum[-1])
    X = (U * spectrum) @ V[:, :n].T
    new = rng.normal(size=(tested, len(w))) * np.r_[spectrum, rest] @ V.T / np.sqrt(n)
    return DataSet(name, X, X @ w, new, new @ w)


def all_sets(seed: int) -> list[DataSet]:
    """Every data set of the comparison."""
    rng = np.random.default_rng(seed)
    sparse = np.zeros(32)
    sparse[rng.choice(32, 3, replace=False)] = (1.0, -2.0, 1.5)
    low_rank = np.outer(rng.normal(size=8), rng.normal(size=4)).ravel()
    dense = rng.normal(size=32)
    matrix = gaussian("a matrix of rank 1", 16, low_rank, np.linspace(2, 1, 16), seed + 4)
    return [
        SOURCE,
        ONE_EQUATION,
        TWO_EQUATIONS,
        wilson(6, 4, 200),
        gaussian("even spectrum", 12, dense, np.linspace(2, 1, 12), seed + 1),
        gaussian("lopsided spectrum", 12, dense, 2 / np.arange(1.0, 13), seed + 2),
        gaussian("sparse weights", 16, sparse, np.linspace(2, 1, 16), seed + 3),
        matrix._replace(shape=(8, 4)),
    ]
