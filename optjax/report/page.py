"""The report: one HTML page that needs no network, no script and no other file."""

import json
from collections.abc import Collection, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from optjax.report.claims import SYMBOLS, Claim, in_order
from optjax.report.rendering import anchor, data_uri, render
from optjax.support import provenance
from optjax.support.files import write_text


def read_records(results: Path, names: Collection[str]) -> list[dict[str, Any]]:
    """Read what these experiments left for the report (figures/NAME/record.json), in order."""
    files = sorted(results.glob("figures/*/record.json"))
    return [
        json.loads(file.read_text(encoding="utf-8")) for file in files if file.parent.name in names
    ]


def write_page(results: Path, records: Sequence[Mapping[str, Any]]) -> Path:
    """Write results/report/index.html and return its path.

    Args:
        results: the folder that holds the figures.
        records: what each experiment left, see `read_records`.
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
    page = render(
        "report.html.j2",
        claims=claims,
        symbols=SYMBOLS,
        records=records,
        owners=owners,
        targets={claim.id: _target(claim, owners[claim.id]) for claim in claims},
        pictures=pictures,
        now=datetime.now(UTC),
        commit=provenance.commit(),
        versions=", ".join(f"{k} {v}" for k, v in sorted(provenance.versions().items())),
    )
    path = results / "report" / "index.html"
    write_text(path, page)
    return path


def _target(claim: Claim, record: Mapping[str, Any]) -> str:
    """Find the id of the figure that the evidence names, else of the claim's experiment."""
    words = claim.evidence.replace(".svg", "").replace("/", " ").split()
    for figure in record["figures"]:
        if figure["name"] in words:
            return anchor(f"{record['name']}-{figure['name']}")
    return anchor(record["name"])
