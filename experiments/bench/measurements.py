"""``make measurements``: the page of the measurements that were noted, and one's own page.

Command: python -m optjax.experiments.bench.measurements
It writes MEASUREMENTS.md from measurements.toml alone; and, where results/bench.json is there,
results/measurements.md with these benchmarks first.
"""

import itertools
import json
import sys
import tomllib
from pathlib import Path
from typing import Any

from optjax.support.files import write_text

NOTED = Path(__file__).with_suffix(".toml")
BENCH = Path("results/bench.json")
FACTS = ("machine", "versions", "commit", "date")


def noted() -> dict[str, Any]:
    """Read the noted measurements; numbers with a point stay as they are written."""
    with NOTED.open("rb") as file:
        return tomllib.load(file, parse_float=str)


def page(noted: dict[str, Any], bench: dict[str, Any] | None = None) -> str:
    """Write measurements as Markdown, grouped by room, those of a bench first."""
    entries = noted["measurement"] if bench is None else [of_bench(bench), *noted["measurement"]]
    parts = ["# Measurements\n", noted["about"]]
    for room, members in itertools.groupby(entries, lambda entry: entry["room"]):
        parts.append(f"## {room[0].upper()}{room[1:]}\n")
        parts += map(_section, members)
    return "\n".join(parts)


def _section(entry: dict[str, Any]) -> str:
    rows = [entry["columns"], ["---"] * len(entry["columns"]), *entry["rows"]]
    parts = [f"### {entry['name']}", entry.get("what", "")]
    parts.append("\n".join(f"| {' | '.join(map(_cell, row))} |" for row in rows))
    parts.append("\n".join(f"- {note}" for note in entry.get("notes", ())))
    command = f"`{entry['command']}`" if "command" in entry else "command: not recorded"
    facts = (f"{fact}: {entry.get(fact, 'not recorded')}" for fact in FACTS)
    parts.append(f"<sub>{' · '.join((command, *facts))}</sub>\n")
    return "\n\n".join(filter(None, parts))


def _cell(value: str | int) -> str:
    return f"{value:,}" if isinstance(value, int) else value.replace("|", "\\|")


def of_bench(bench: dict[str, Any]) -> dict[str, Any]:
    """Write the record of a bench as one measurement."""

    def span(values: dict[str, float] | None) -> str:
        return "{median:.3g} ({min:.3g} to {max:.3g})".format(**values) if values else ""

    def listed(facts: dict[str, Any]) -> str:
        return ", ".join(f"{name} {value}" for name, value in facts.items())

    return {
        "room": "your own bench",
        "name": f"`make bench`, {bench['repeats']} rounds",
        "what": "Medians (lowest to highest); ratios to the reference, round by round.",
        "command": "python -m optjax.experiments.bench",
        "machine": f"{listed(bench['machine'])}; load {bench['load_average']}",
        "versions": listed(bench["versions"]),
        "commit": bench["commit"],
        "date": bench["started"],
        "columns": ["benchmark", "side", "time", "unit", "ratio"],
        "rows": [
            [entry["name"], side, span(times), entry["unit"], span(entry["ratios"].get(side))]
            for entry in bench["benchmarks"]
            for side, times in entry["sides"].items()
        ],
        "notes": [f"{e['name']}: {e['missing']}" for e in bench["benchmarks"] if e["missing"]],
    }


def main() -> int:
    """Write the pages; 2 where results/bench.json is no record of a bench, else 0."""
    pages = {Path("MEASUREMENTS.md"): page(noted())}
    try:
        if BENCH.exists():
            bench = json.loads(BENCH.read_text(encoding="utf-8"))
            pages[BENCH.with_name("measurements.md")] = page(noted(), bench)
    except (ValueError, LookupError, TypeError, AttributeError):
        print(f"bench: {BENCH} is no record of a bench: run make bench again", file=sys.stderr)
        return 2
    for path, text in pages.items():
        write_text(path, text)
        print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
