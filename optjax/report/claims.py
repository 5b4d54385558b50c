"""A claim of the source, what was measured, and the verdict that follows."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

from optjax.report.rendering import cut, in_line, number
from optjax.support.errors import UserError
from optjax.support.files import parsed_json, plain, write_text
from optjax.support.provenance import Machine, Provenance

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

SECTIONS = {
    "1 Optimisation": ("min-norm", "rmsprop"),
    "2 Gradient-based hyperparameter optimisation": ("one-step", "weight-decay"),
    "3 Trading off resources": ("batch-size", "scaling"),
    "4–5 Colourisation": ("accounting", "colourisation", "padding"),
    "Beyond the source": tuple(
        "hypergradient implicit-bias noise-scale short-horizon tuning".split()
    ),
}
"""The source's sections and the topics of each; so is any other topic of the last."""

LENGTHS = {"plain_words": 90, "source_short": 60, "measured_short": 80}
"""The most characters of what a reader sees of a claim on one line."""

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
        plain_words: the claim on one line; the statement if "".
        source_short: the source's value on the same line; `source` if "".
        measured_short: ours, with its interval, on that line; the first number measured if "".
        needs: what a claim that was not run needs, and the command that gets it; dropped from
            any other.
        provenance: command, commit, date, versions and machine; filled in when it is written.

    Raises:
        UserError: the id or the verdict is not of the form above.

    >>> claim = Claim("padding/kernel-4", "p = 1", 1, {"p": 1}, None, 1, None, "holds", "")
    >>> claim.verdict, claim.section, claim.source_short, claim.measured_short
    ('holds', '4–5 Colourisation', '1', 'p 1')
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
    plain_words: str = ""
    source_short: str = ""
    measured_short: str = ""
    needs: str = ""
    provenance: Provenance | None = None

    def __post_init__(self) -> None:
        if not _ID.fullmatch(self.id):
            raise UserError(f"claim id {self.id!r} is not 'topic/name' in lower case with hyphens")
        if self.verdict not in VERDICTS:
            raise UserError(
                f"claim {self.id!r} has the verdict {self.verdict!r}; "
                f"expected one of {', '.join(VERDICTS)}"
            )
        # The class is frozen, so fields are set by the way round.
        if self.verdict != "not run":
            object.__setattr__(self, "needs", "")
        first = next(iter(self.measured.items()), ("", "nothing"))
        otherwise = (self.statement, in_line(self.source), f"{first[0]} {in_line(first[1])}")
        for (name, most), text in zip(LENGTHS.items(), otherwise, strict=True):
            object.__setattr__(self, name, cut(getattr(self, name) or text, most))

    @property
    def section(self) -> str:
        """Section of the source that the claim's topic belongs to."""
        return section_of(self.id.partition("/")[0])

    @property
    def outcome(self) -> str:
        """What was measured, in short; of a claim not run, the first sentence of its needs."""
        missing = self.needs.split(". ")[0] if self.verdict == "not run" else ""
        return cut(missing or self.measured_short, LENGTHS["measured_short"])


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


def prediction_interval(values: Any) -> list[float] | None:
    """Compute the 95 % interval of one further value; None for fewer than two values.

    m ± t₀.₉₇₅,ₙ₋₁ · s √(1 + 1/n)

    >>> [round(end, 3) for end in prediction_interval([1.0, 2.0, 3.0])]
    [-2.968, 6.968]
    """
    ends = mean_interval(values)
    if ends is None:
        return None
    middle, wider = sum(ends) / 2, (len(values) + 1) ** 0.5
    return [middle + wider * (end - middle) for end in ends]


def with_interval(value: float, interval: Any, digits: int = 3, unit: str = "") -> str:
    """Write a value in short, and its interval in brackets where there is one.

    >>> with_interval(54.812, [54.101, 55.49], unit=" %"), with_interval(2.0, None)
    ('54.8 % [54.1, 55.5]', '2')
    """
    said = f"{number(value, digits)}{unit}"
    if interval is None:
        return said
    return f"{said} [{', '.join(number(end, digits) for end in interval)}]"


def in_order(claims: Iterable[Claim]) -> list[Claim]:
    """Sort claims by topic and the source's order; keep the later of two with one id."""
    latest = {claim.id: claim for claim in claims}
    topics = [topic for topics in SECTIONS.values() for topic in topics]
    rank = {name: i for i, name in enumerate((*topics, *ORDER))}

    def place(claim: Claim) -> tuple[int, int, str]:
        topic = claim.id.partition("/")[0]
        return rank.get(topic, len(rank)), rank.get(claim.id, len(rank)), claim.id

    return sorted(latest.values(), key=place)


def section_of(topic: str) -> str:
    """Find the section of the source that a topic belongs to.

    >>> section_of("padding"), section_of("tuning")
    ('4–5 Colourisation', 'Beyond the source')
    """
    return next((s for s, topics in SECTIONS.items() if topic in topics), [*SECTIONS][-1])


def by_section(claims: Iterable[Claim]) -> dict[str, list[Claim]]:
    """List the claims of each section that has any, all in the source's order."""
    ordered = in_order(claims)
    found = {name: [c for c in ordered if c.section == name] for name in SECTIONS}
    return {name: these for name, these in found.items() if these}


def origins(claims: Iterable[Claim]) -> dict[str, str]:
    """Say where, by which code and when the claims were measured.

    Where they differ, each value stands with the number of claims that it is of.
    """
    known = [claim.provenance or {} for claim in claims]
    return {
        name.capitalize(): _counted(describe(p[name]) for p in known if p.get(name))
        for name, describe in (
            ("machine", _machine),
            ("versions", in_line),
            ("commit", str),
            ("date", lambda date: str(date)[:10]),
        )
    }


def _machine(machine: Machine) -> str:
    """Describe a machine in one line; an accelerator stands beside its computer."""
    said = f"{machine['processor']}, {machine['cores']} cores, {machine['system']}"
    if memory := machine.get("memory_gib"):
        said += f", {memory:g} GiB"
    return said if machine["backend"] == "cpu" else f"{machine['device']}; {said}"


def _counted(values: Iterable[str]) -> str:
    counts = Counter(values)
    if len(counts) < 2:
        return next(iter(counts), "unknown")
    return "; ".join(f"{value} ({count} claims)" for value, count in counts.items())


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


def claim_of(row: Mapping[str, Any]) -> Claim:
    """Make a claim of what was read.

    Raises:
      TypeError: a field is missing, unknown or of another type. UserError: it is no claim.
    """
    kinds = get_type_hints(Claim)
    for name, value in checked(row, dict[str, Any]).items():
        checked(value, kinds.get(name, Any))
    return Claim(**row)


def checked(value: Any, kind: Any) -> Any:
    """Return a value that was read, if it is of that type throughout.

    Raises:
      TypeError: it is not.
    """
    from typeguard import CollectionCheckStrategy, TypeCheckError, check_type

    every = CollectionCheckStrategy.ALL_ITEMS
    try:
        return check_type(value, kind, collection_check_strategy=every)
    except TypeCheckError as error:
        raise TypeError(str(error)) from None


def read_claims(path: str | Path) -> list[Claim]:
    """Read the claims of a file; none where there is no file."""
    path = Path(path)
    if not path.is_file():
        return []
    try:
        return [claim_of(row) for row in parsed_json(path.read_text(encoding="utf-8"))]
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is not a list of claims ({error}); remove it") from error
