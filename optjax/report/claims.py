"""A claim of the source, what was measured, and the verdict that follows."""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from optjax.support.errors import UserError
from optjax.support.files import plain, write_text

Verdict = Literal["holds", "corrected", "refuted", "not run"]
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)
SYMBOLS = {"holds": "✓", "corrected": "≈", "refuted": "✕", "not run": "–"}

ORDER = (
    "min-norm/sgd",
    "min-norm/start-off-row-space",
    "rmsprop/hand-iterates",
    "rmsprop/not-min-norm",
    "one-step/loss",
    "one-step/hypergradient",
    "one-step/optimal-learning-rate",
    "weight-decay/equivalence",
    "weight-decay/adaptive-differs",
    "batch-size/optimal-learning-rate",
    "batch-size/critical",
    "batch-size/noise-regime",
    "batch-size/curvature-regime",
    "scaling/model-size",
    "scaling/hoffmann-refit",
    "accounting/weights",
    "accounting/weights-64",
    "accounting/outputs-32",
    "accounting/connections-32",
    "accounting/outputs-64",
    "accounting/connections-64",
    "colourisation/pool-upsample",
    "colourisation/conv-transpose",
    "colourisation/unet",
    "colourisation/transpose-beats-pool",
    "colourisation/why-more-parameters",
    "colourisation/why-pooling-discards",
    "padding/kernel-4",
    "padding/kernel-5",
)
"""The source's own order, in which claims are written and shown; any others follow by name."""

_ID = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*/[a-z0-9]+(-[a-z0-9]+)*")


@dataclass(frozen=True)
class Claim:
    """One claim: what the source says, what was measured, and what follows.

    Args:
        id: "topic/name", lower case, with hyphens.
        statement: the claim in one sentence.
        source: what the source says: text, a number, or a dict of them.
        measured: numbers with their names (units or shapes in the name or as text).
        tolerance: how far measured and source may lie apart.
        n_runs: how many runs the measurement rests on.
        interval: 95 % interval where the value is statistical: [low, high] or a dict of such.
        verdict: "holds", "corrected", "refuted" or "not run"; see `verdict`.
        evidence: the figure that shows it ("NAME/FIGURE"), or the result file.
        config: the experiment's config; filled in when the claim is written.
        seconds: how long the experiment took; filled in when the claim is written.

    Raises:
        UserError: the id or the verdict is not of the form above.

    >>> Claim("padding/kernel-4", "p = 1", "p = 1", {"p": 1}, None, 1, None, "holds", "").verdict
    'holds'
    """

    id: str
    statement: str
    source: Any
    measured: Mapping[str, Any]
    tolerance: str | float | None
    n_runs: int
    interval: Any
    verdict: str
    evidence: str
    config: Mapping[str, Any] | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        if not _ID.fullmatch(self.id):
            raise UserError(f"claim id {self.id!r} is not 'topic/name' in lower case with hyphens")
        if self.verdict not in VERDICTS:
            raise UserError(
                f"claim {self.id!r} has the verdict {self.verdict!r}; "
                f"expected one of {', '.join(VERDICTS)}"
            )


def verdict(holds: Any, *, reasoning: Any = False) -> Verdict:
    """Derive the verdict from measurements; it is computed, never written down.

    Args:
        holds: whether measured and source agree within the tolerance.
        reasoning: whether the source's argument stands although its figure does not.

    >>> verdict(True), verdict(False, reasoning=True), verdict(False)
    ('holds', 'corrected', 'refuted')
    """
    if bool(holds):
        return "holds"
    return "corrected" if bool(reasoning) else "refuted"


def mean_interval(values: Any) -> list[float] | None:
    """Compute the mean's 95 % interval by Student's t; None for fewer than two values.

    m ± t₀.₉₇₅,ₙ₋₁ · s/√n

    >>> [round(end, 3) for end in mean_interval([1.0, 2.0, 3.0])]
    [-0.484, 4.484]
    """
    import numpy as np
    from scipy import stats

    values = np.asarray(values, float)
    if len(values) < 2:
        return None
    half = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    return [float(values.mean() - half), float(values.mean() + half)]


def in_order(claims: Iterable[Claim]) -> list[Claim]:
    """Sort claims into the source's order, and keep the later of two with one id."""
    latest = {claim.id: claim for claim in claims}
    rank = {name: i for i, name in enumerate(ORDER)}
    return sorted(latest.values(), key=lambda claim: (rank.get(claim.id, len(rank)), claim.id))


def write_claims(claims: Iterable[Claim], path: str | Path, *, merge: bool = True) -> None:
    """Write claims to a JSON file in one fixed order, merged by id with those already there.

    The file is replaced whole, so a reader never sees half of it. A NaN or an infinity is
    written as null, with its name under the same key followed by "_text".
    """
    path = Path(path)
    merged = {old.id: old for old in read_claims(path)} if merge else {}
    merged |= {claim.id: claim for claim in claims}
    rows = [plain(asdict(claim)) for claim in in_order(merged.values())]
    write_text(path, json.dumps(rows, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_claims(path: str | Path) -> list[Claim]:
    """Read the claims of a file; none where there is no file."""
    path = Path(path)
    if not path.is_file():
        return []
    try:
        return [Claim(**row) for row in json.loads(path.read_text(encoding="utf-8"))]
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is not a list of claims ({error}); remove it") from error
