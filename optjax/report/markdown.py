"""The claims as a page of Markdown: a table for each section of the source."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from optjax.report.claims import SYMBOLS, Claim, by_section, origins, read_claims
from optjax.report.rendering import cut, number
from optjax.support.errors import UserError
from optjax.support.files import write_text

CELL = 100
"""The most characters of a cell."""

_HEADS = ("id", "claim", "source", "measured [95 % interval]", "verdict", "command", "seconds")


def write_markdown(results: Path, file: Path) -> None:
    """Write the table of all claims from results/claims.json.

    Raises:
        UserError: there are no claims yet, or the file cannot be written.
    """
    claims = read_claims(results / "claims.json")
    if not claims:
        raise UserError(
            f"no claims in {str(results)!r}; run 'optjax reproduce' first, or give --results"
        )
    try:
        write_text(file, markdown(claims))
    except OSError as error:
        raise UserError(f"cannot write {file}: {error.strerror or error}") from error


def markdown(claims: Sequence[Claim]) -> str:
    """Write the claims as Markdown.

    >>> claim = Claim("padding/kernel-4", "p = 1", 1, {"p": 1}, None, 1, None, "holds", "")
    >>> print(markdown([claim]).splitlines()[-1])
    | `padding/kernel-4` | p = 1 | 1 | p 1 | ✓ holds | – | – |
    """
    found = by_section(claims)
    several = len({(c.provenance or {}).get("commit") for c in claims}) > 1
    lines = [
        "# Results",
        "",
        "What each claim of the source says and what was measured. "
        "`optjax report --markdown RESULTS.md` writes this page from `results/claims.json`, which "
        "`optjax reproduce` writes; the report, `results/report/index.html`, has the figures and "
        "every number.",
        "",
        *(["**These claims were measured at several commits.**", ""] if several else []),
        *(f"- {name}: {_escaped(said)}" for name, said in origins(claims).items()),
        f"- Verdicts: {_verdicts(claims)}",
        "",
        "Seconds are those of the whole command, which may decide several claims. A claim *beyond "
        "the source* is ours.",
    ]
    for section, these in found.items():
        lines += ["", f"## {section}", "", _row(_HEADS), _row("---" for _ in _HEADS)]
        lines += [_row(_cells(claim)) for claim in these]
    return "\n".join(lines) + "\n"


def _verdicts(claims: Sequence[Claim]) -> str:
    """Count the verdicts; name the claims that were not simply confirmed."""
    said = []
    for verdict, symbol in SYMBOLS.items():
        these = [f"`{c.id}`" for c in claims if c.verdict == verdict]
        names = "" if verdict == "holds" or not these else f" ({', '.join(these)})"
        said.append(f"{symbol} {len(these)} {verdict}{names}")
    return ", ".join(said)


def _cells(claim: Claim) -> list[str]:
    command = (claim.provenance or {}).get("command")
    texts = (claim.plain_words, claim.source_short, claim.outcome)
    return [
        f"`{claim.id}`",
        *(_plain(text) for text in texts),
        f"{SYMBOLS[claim.verdict]} {claim.verdict}",
        f"`{cut(command, CELL - 2)}`" if command else "–",
        "–" if claim.seconds is None else number(claim.seconds, 2),
    ]


def _plain(text: str) -> str:
    """Escape a text that is cut to a cell's length."""
    return _escaped(cut(text, CELL - len(_escaped(text)) + len(text)))


def _escaped(text: str) -> str:
    """Escape what Markdown would take for its own."""
    return re.sub(r"([\\`*_<>|])", r"\\\1", text)


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"
