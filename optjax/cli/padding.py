"""optjax padding: every padding that takes one size to another."""

import json
import re

from optjax.cli.words import grouped, number, one, switch, whole
from optjax.support.errors import UserError, nearest

USAGE = """\
usage: optjax padding --kernel 5 --stride 2 --in 32 --out 16 [--transposed] [--dilation 1|all]

Every (padding, output padding, dilation) that takes a size to another.

--kernel, --stride   of the convolution (stride 1)
--in, --out          pixels along one side, before and after
--transposed         a transposed convolution: padding is taken off its output
--dilation           a number (1), or all whose kernel fits into the picture
--json               for machines
"""


def padding(words: list[str]) -> int:
    """Print every padding that takes one size to another."""
    from optjax.convnets.geometry import solve_padding

    groups = grouped(words)
    transposed, as_json = switch(groups, "transposed"), switch(groups, "json")
    missing = [name for name in ("kernel", "in", "out") if name not in groups]
    if missing:
        raise UserError(f"padding needs {', '.join(f'--{name}' for name in missing)}")
    kernel, stride = number(groups, "kernel"), number(groups, "stride", "1")
    size_in, size_out = number(groups, "in"), number(groups, "out")
    word = one(groups, "dilation", "1")
    dilation = None if word == "all" else whole("dilation", word)
    for name in groups:
        known = re.findall(r"--([a-z]+)", USAGE)
        raise UserError(f"unknown option '--{name}'; {nearest(name, known)}")
    found = solve_padding(kernel, stride, size_in, size_out, transposed, dilation)
    if as_json:
        print(json.dumps([solution._asdict() for solution in found], indent=1))
        return 0
    name = "transposed convolution" if transposed else "convolution"
    print(f"{name}, kernel {kernel}, stride {stride}, {size_in} → {size_out}")
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE, pad_edge=False)
    for heading in ("padding", *(("output padding",) if transposed else ()), "dilation"):
        table.add_column(heading, justify="right")
    for p, o, d in found:
        table.add_row(str(p), *((str(o),) if transposed else ()), str(d))
    Console(highlight=False).print(table)
    return 0
