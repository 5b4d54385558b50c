"""The report: one HTML page that needs no network, no script and no other file."""

from collections.abc import Collection, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypedDict

from optjax.report.claims import SYMBOLS, Claim, by_section, checked, claim_of, in_order, origins
from optjax.report.rendering import anchor, data_uri, render
from optjax.support.console import Console
from optjax.support.errors import UserError
from optjax.support.files import parsed_json, write_text
from optjax.support.provenance import Provenance

HEAD_FIGURE = ("minimum_norm", "paths")
"""Experiment and figure that stand at the head of the page."""


class Drawn(TypedDict):
    """A figure that an experiment has drawn."""

    name: str
    caption: str
    files: list[str]
    wide: bool


class Record(Provenance):
    """What an experiment left for the report."""

    name: str
    title: str
    doc: str
    demo: bool
    config: dict[str, Any]
    seconds: float
    figures: list[Drawn]
    claims: list[dict[str, Any]]


def read_records(results: Path, names: Collection[str]) -> list[Record]:
    """Read what these experiments left for the report (figures/NAME/record.json), in order.

    One that is damaged is named and left out.
    """
    found = []
    for file in sorted(results.glob("figures/*/record.json")):
        if file.parent.name not in names:
            continue
        try:
            record = checked(parsed_json(file.read_text(encoding="utf-8")), Record)
            for row in record["claims"]:
                claim_of(row)
            drawn = [figure["name"] for figure in record["figures"]]
            there = [figure.stem for figure in file.parent.glob("*.svg")]
            if record["name"] != file.parent.name or not set(drawn) <= set(there):
                raise ValueError("a name of something else")
            found.append(record)
        except (ValueError, TypeError, OSError, UserError) as error:
            name = file.parent.name
            Console().line(
                f"optjax: {file} is damaged ({type(error).__name__}) and left out of the report: "
                f"'optjax run {name} --force' writes it again"
            )
    return found


def write_page(results: Path, records: Sequence[Record], waiting: Sequence[str] = ()) -> Path:
    """Write results/report/index.html and return its path.

    Args:
        results: the folder that holds the figures.
        records: what each experiment left, see `read_records`.
        waiting: names of experiments that have left nothing yet.
    """
    claims = in_order(Claim(**row) for record in records for row in record["claims"])
    owners = {row["id"]: record for record in records for row in record["claims"]}
    pictures = {
        (record["name"], figure["name"]): data_uri(
            results / "figures" / record["name"] / f"{figure['name']}.svg"
        )
        for record in records
        for figure in record["figures"]
    }
    head = [
        (record, figure)
        for record in records
        for figure in record["figures"]
        if (record["name"], figure["name"]) == HEAD_FIGURE
    ]
    page = render(
        "report.html.j2",
        claims=by_section(claims),
        named={v: [c for c in claims if c.verdict == v] for v in SYMBOLS},
        symbols=SYMBOLS,
        records=_by_section(records),
        owners=owners,
        targets={claim.id: _target(claim, owners[claim.id]) for claim in claims},
        pictures=pictures,
        head=head[0] if head else None,
        waiting=waiting,
        demos=[record["name"] for record in records if record["demo"]],
        origins=origins(claims),
        now=datetime.now(UTC),
    )
    path = results / "report" / "index.html"
    write_text(path, page)
    return path


def _by_section(records: Sequence[Record]) -> dict[str, list[Record]]:
    """List the experiments of each section: that of their first claim, in the claims' order."""
    found: dict[str, list[Record]] = {}
    owners = {row["id"]: record for record in records for row in record["claims"]}
    for section, claims in by_section(
        Claim(**row) for record in records for row in record["claims"]
    ).items():
        for claim in claims:
            record = owners[claim.id]
            if not any(record in those for those in found.values()):
                found.setdefault(section, []).append(record)
    if rest := [record for record in records if not record["claims"]]:
        found["Without a claim"] = rest
    return found


def _target(claim: Claim, record: Record) -> str:
    """Find the id of the figure that the evidence names, else of the claim's experiment."""
    words = claim.evidence.replace(".svg", "").replace("/", " ").split()
    for figure in record["figures"]:
        if figure["name"] in words:
            return anchor(f"{record['name']}-{figure['name']}")
    return anchor(record["name"])
