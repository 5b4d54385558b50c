"""What `optjax scaling` prints for a person."""

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from optjax.scaling import Allocation, Check


def print_allocations(rows: "dict[str, Allocation]") -> None:
    """Print a budget by each law, side by side."""

    def text(x: Any) -> str:
        return "" if x is None else f"{float(x):.3g}"

    headings = ("law", "parameters N", "tokens D", "D/N", "batch, tokens", "steps", "loss")
    body = [
        [name, *map(text, (r.N, r.D, float(r.D) / float(r.N), r.batch, r.steps)), f"{r.loss:.3f}"]
        for name, r in rows.items()
    ]
    print_table(headings, body)


def print_table(headings: tuple[str, ...], body: list[list[str]]) -> None:
    """Print a table, its numbers to the right."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE, pad_edge=False)
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="right" if i else "left", no_wrap=True)
    for row in body:
        table.add_row(*row)
    console = Console(highlight=False, markup=False)
    # Piped into a file, rich would fold the table to 80 columns.
    if not console.is_terminal:
        console = Console(highlight=False, markup=False, width=120)
    console.print(table)


def contradiction_lines(checks: "list[Check]") -> list[str]:
    """Compare what the papers print with what follows from it, a line each."""
    lines = []
    for check in checks:
        verdict = "CONTRADICTS" if check.contradicts else "agrees with"
        of = "the printed constants"
        if "approach 1" in check.what or "approach 2" in check.what:  # estimates of their own
            of = "the printed constants of approach 3"
            verdict = "differs from" if check.contradicts else verdict
        lines.append(
            f"{check.what}: printed exponent {check.printed:.2f} {verdict} {of}, "
            f"which give {check.computed:.3f} ({check.low:.3f} to {check.high:.3f} by rounding)"
        )
    return lines


def print_fit(record: dict[str, Any]) -> None:
    """Print the record for a person."""

    def text(x: float | None) -> str:
        return "beyond numbers" if x is None else f"{x:.5g}"

    def rows(values: dict[str, Any]) -> list[list[str]]:
        return [
            [name, text(v["value"]), f"{text(v['low'])} to {text(v['high'])}", text(v["error"])]
            for name, v in values.items()
            if isinstance(v, dict)
        ]

    where = ", ".join(f"{name} from {column!r}" for name, column in record["columns"].items())
    print(f"{record['law']} fitted to {record['runs']} runs of {record['file']} ({where})")
    headings = ("", "value", "95 % interval", "standard error")
    print_table(headings, rows(record["parameters"]))
    print(f"objective {record['objective']:.6g} (sum of Huber losses of log residuals, δ = 1e-3)")
    for name, value in record.get("published", {}).items():
        times = value / record["objective"] if record["objective"] else math.inf
        print(
            f"  the published law ({name}) scores {value:.6g} on these runs: {times:.3g} times it"
        )
    if not record["converged"]:
        print("the minimiser did not converge: the runs hardly identify this law")
    print(
        f"{record['starts_agreeing']:.0%} of {record['starts']} starts agree; intervals by "
        f"{record['bootstraps']} resamples"
        + (f", {record['bootstraps_failed']} had no minimum" * bool(record["bootstraps_failed"]))
    )
    for line in record["warnings"]:
        print(line)
    if "outliers" in record:
        print("\nwithout the highest losses:")
        hidden = ("dropped", "converged")
        names = [k for k in record["outliers"][0] if k not in hidden and "_text" not in k]
        body = [
            [f"{row['dropped']}{'' if row['converged'] else ' (no minimum found)'}"]
            + [text(row[k]) for k in names]
            for row in record["outliers"]
        ]
        print_table(("dropped", *names), body)
    if "allocation" in record:
        best = record["allocation"]
        print(f"the best use of {best['flops']:.3g} floating-point operations, C = 6ND:")
        print_table(headings, rows(best))
