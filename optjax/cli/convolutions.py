"""optjax convolutions: how many runs are convolved on this user's devices, and why."""

import json

from optjax.cli.words import grouped, switch
from optjax.support.errors import UserError, nearest

USAGE = """\
usage: optjax convolutions [--json]

The ways in which convolutions of many runs were tried on a device, in milliseconds, and which one
programs take there. Each was measured when a program first asked for it. To measure again, delete
the file that is named. On the CPU nothing is measured: runs are convolved one by one.

--json   for machines
"""


def convolutions(words: list[str]) -> int:
    """Print the table of what was measured."""
    from optjax.convnets import choice

    groups = grouped(words)
    as_json = switch(groups, "json")
    for name in groups:
        raise UserError(f"unknown option '--{name}'; {nearest(name, ['json'])}")
    found = choice.measured()
    if as_json:
        print(json.dumps([row._asdict() for row in found], indent=1))
        return 0
    if not found:
        print(f"nothing measured yet (would be kept in {choice.MEASURED.file})")
        return 0
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE, pad_edge=False)
    for heading in ("device", "convolution", "taken"):
        table.add_column(heading)
    for heading in ("runs", *choice.WAYS):
        table.add_column(heading, justify="right")
    for row in found:
        times = (f"{row.ms[way]:.3g}" if way in row.ms else "failed" for way in choice.WAYS)
        table.add_row(row.device, row.convolution, row.way, str(row.runs), *times)
    Console(highlight=False, markup=False).print(table)
    print(f"milliseconds, kept in {choice.MEASURED.file}")
    return 0
