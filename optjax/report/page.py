"""The report: one HTML page that needs no network, no script and no other file."""

import base64
import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any

from optjax.report.claims import VERDICTS, Claim, in_order
from optjax.report.page_style import STYLE
from optjax.support import provenance
from optjax.support.files import write_text

SYMBOLS = {"holds": "✓", "corrected": "≈", "refuted": "✕", "not run": "–"}


def read_records(results: Path, names: Iterable[str] | None = None) -> list[dict[str, Any]]:
    """What each experiment left for the report (figures/NAME/record.json), in a fixed order."""
    records = []
    for file in sorted(results.glob("figures/*/record.json")):
        if names is None or file.parent.name in names:
            records.append(json.loads(file.read_text(encoding="utf-8")))
    return records


def write_page(results: Path, records: Sequence[Mapping[str, Any]] | None = None) -> Path:
    """Write results/report/index.html and give its path."""
    records = read_records(results) if records is None else records
    pictures = {
        (record["name"], figure["name"]): data_uri(
            results / "figures" / record["name"] / f"{figure['name']}.svg"
        )
        for record in records
        for figure in record["figures"]
    }
    path = results / "report" / "index.html"
    write_text(path, render(records, pictures))
    return path


def data_uri(path: Path) -> str:
    """A picture file as text that a page can hold."""
    return "data:image/svg+xml;base64," + base64.b64encode(path.read_bytes()).decode()


FOLD = 7
"""Rows of a claim's values that show at once; the rest unfold."""


def number(value: float) -> str:
    """A number at no more than six significant digits; two where it is rounding error.

    >>> number(0.1 + 0.2), number(49728), number(1.23456789e-9), number(float("nan"))
    ('0.3', '49,728', '1.2e−9', 'nan')
    """
    if isinstance(value, int) or (abs(value) < 1e9 and value == int(value)):
        return f"{int(value):,}".replace("-", "−")
    mantissa, _, exponent = f"{value:.{2 if abs(value) < 1e-6 else 6}g}".partition("e")
    return (f"{mantissa}e{int(exponent)}" if exponent else mantissa).replace("-", "−")


def show(value: Any) -> str:
    """A claim's source, measured value or interval as HTML, every text escaped.

    >>> show({"loss": [1.0, 2.5]})
    '<dl><dt>loss</dt><dd>1, 2.5</dd></dl>'
    """
    if value is None or value == "":
        return '<span class="none">–</span>'
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        return number(value)
    if isinstance(value, Mapping):
        rows = []
        for key, item in value.items():
            if item is None and f"{key}_text" in value:
                continue
            rows.append(f"<dt>{escape(str(key))}</dt><dd>{show(item)}</dd>")
        first, rest = f"<dl>{''.join(rows[:FOLD])}</dl>", "".join(rows[FOLD:])
        if rest:
            more = f"<summary>{len(rows) - FOLD} more</summary>"
            first += f"<details>{more}<dl>{rest}</dl></details>"
        return first
    if isinstance(value, list | tuple):
        if value and all(isinstance(item, list | tuple) for item in value):
            return "; ".join(f"[{show(item)}]" for item in value)
        return ", ".join(show(item) for item in value)
    return escape(str(value))


def badge(verdict: str) -> str:
    """A verdict as a sign, a colour and a word: any one of them is enough."""
    kind = verdict.replace(" ", "-")
    return (
        f'<span class="badge {escape(kind)}">{SYMBOLS.get(verdict, "?")} {escape(verdict)}</span>'
    )


def render(records: Sequence[Mapping[str, Any]], pictures: Mapping[tuple[str, str], str]) -> str:
    """The whole page as text.

    Args:
        records: what each experiment left, see `read_records`.
        pictures: for (experiment, figure) a data: URI.
    """
    claims = in_order(Claim(**row) for record in records for row in record["claims"])
    demo = [record["name"] for record in records if record["demo"]]
    counts = {v: sum(claim.verdict == v for claim in claims) for v in VERDICTS}
    tiles = "".join(
        f'<li class="{v.replace(" ", "-")}"><b>{n}</b> {SYMBOLS[v]} {v}</li>'
        for v, n in counts.items()
    )
    versions = ", ".join(
        f"{escape(k)} {escape(v)}" for k, v in sorted(provenance.versions().items())
    )
    note = (
        f'<p class="demo"><b>Demo data.</b> {escape(", ".join(demo))}: measured on the small '
        "built-in pictures, so these figures are not comparable with published ones.</p>"
        if demo
        else ""
    )
    links = "".join(
        f'<li><a href="#{_id(r["name"])}">{escape(r["name"])}</a></li>' for r in records
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>optjax: claims and evidence</title>
<style>{STYLE}</style>
</head>
<body>
<header>
<h1>Claims and evidence</h1>
<p class="lede">Every claim of the source document, checked by computation with optjax: what the
source says, what was measured, and the verdict that follows from the two.</p>
<p class="meta">{datetime.now(UTC):%d %B %Y, %H:%M} UTC · commit {escape(provenance.commit())}
· {versions}</p>
<ul class="summary"><li><b>{len(claims)}</b> claims</li>{tiles}</ul>
{note}
</header>
<main>
<section>
<h2>The claims</h2>
{_table(claims, records)}
</section>
<nav aria-label="Experiments"><h2>The experiments</h2><ul class="links">{links}</ul></nav>
{"".join(_experiment(record, pictures) for record in records)}
</main>
<footer>Self-contained: this file needs no network and may be sent as it is.</footer>
</body>
</html>
"""


def _id(*parts: str) -> str:
    return escape("-".join(parts).replace("/", "-").replace(" ", "-"))


_COLUMNS = {
    "Claim": "what",
    "Verdict": "",
    "Source": "value",
    "Measured": "value",
    "95 % interval": "value",
    "Runs": "num",
    "Evidence": "",
}
"""Heads of the table of claims, and the style of their cells."""


def _table(claims: Sequence[Claim], records: Sequence[Mapping[str, Any]]) -> str:
    if not claims:
        return "<p>No claim has been checked yet.</p>"
    owner = {row["id"]: record for record in records for row in record["claims"]}
    rows = []
    for claim in claims:
        tolerance = (
            f'<div class="small">tolerance: {show(claim.tolerance)}</div>'
            if claim.tolerance not in (None, "")
            else ""
        )
        record = owner[claim.id]
        demo = ' <span class="tag">demo data</span>' if record["demo"] else ""
        cells = (
            f"<code>{escape(claim.id)}</code>{demo}<div>{escape(claim.statement)}</div>",
            badge(claim.verdict),
            show(claim.source),
            show(claim.measured) + tolerance,
            show(claim.interval),
            show(claim.n_runs),
            _evidence(claim, record),
        )
        row = "".join(  # the head is shown in the cell where a narrow screen stacks the row
            f'<td class="{kind}" data-head="{head}">{inside}</td>'
            for (head, kind), inside in zip(_COLUMNS.items(), cells, strict=True)
        )
        rows.append(f'<tr id="claim-{_id(claim.id)}">{row}</tr>')
    head = "".join(f'<th scope="col">{text}</th>' for text in _COLUMNS)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="Claims"><table class="claims">'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _evidence(claim: Claim, record: Mapping[str, Any]) -> str:
    """A link to the figure that the evidence names, else to its experiment."""
    name = record["name"]
    text = str(claim.evidence)
    target = _id(name)
    for figure in record["figures"]:
        if figure["name"] in text.replace(".svg", "").replace("/", " ").split():
            target = _id(name, figure["name"])
            break
    return f'<a href="#{target}">{escape(text or name)}</a>'


def _experiment(record: Mapping[str, Any], pictures: Mapping[tuple[str, str], str]) -> str:
    name = record["name"]
    figures = "".join(
        f'<figure id="{_id(name, figure["name"])}"><div class="card">'
        f'<img src="{escape(pictures[name, figure["name"]])}" '
        f'alt="{escape(figure["caption"] or figure["name"])}"></div>'
        f"<figcaption>{escape(figure['caption'])}</figcaption></figure>"
        for figure in record["figures"]
        if (name, figure["name"]) in pictures
    )
    config = "".join(
        f'<tr><th scope="row"><code>{escape(key)}</code></th><td>{show(value)}</td></tr>'
        for key, value in record["config"].items()
    )
    demo = ' <span class="tag">demo data</span>' if record["demo"] else ""
    claims = " ".join(
        f'<a href="#claim-{_id(row["id"])}"><code>{escape(row["id"])}</code></a>'
        for row in record["claims"]
    )
    return f"""<section class="experiment" id="{_id(name)}">
<h3>{escape(name)}{demo}</h3>
<p class="question">{escape(record["title"])}</p>
<p class="small">Claims: {claims or "none"}</p>
{figures}
<details open><summary>How it was run</summary>
<pre><code>{escape(record["command"])}</code></pre>
<p class="small">{_duration(float(record["seconds"]))} · commit {escape(record["commit"])}
· {escape(record["date"])}</p>
<div class="scroll"><table class="config"><tbody>{config}</tbody></table></div>
</details>
</section>
"""


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 7200 else f"{seconds / 3600:.3g} h"
