"""optjax account: the table of a network's layers, its totals, and what its layers see."""

import json
import keyword
import re
import sys
from typing import TYPE_CHECKING, Any

from optjax.cli.named_networks import find_model, model_fields
from optjax.cli.words import grouped, number, one, switch
from optjax.support.errors import UserError

if TYPE_CHECKING:
    from optjax.accounting.account import Accounting

USAGE = """\
usage: optjax account MODEL [--input 32x32x1] [--symbolic] [--FIELD VALUE ...]

Weights, outputs, connections, operations and memory of a network, by layer.

MODEL        pool-upsample, conv-transpose, unet, or your own as package.module:Class
--input      of one example: height x width x channels; a name makes a symbol, as in HxWxNIC
--FIELD      a constructor argument of MODEL: --filters 64; a name makes a symbol: --filters NF
--symbolic   all in symbols: the picture H x W x NIC and, for our nets, NF filters and NC colours
--at         sizes at which symbolic totals are also written (32x32 64x64)
--batch      examples of a training step (100)
--dtype      of the input (float32)
--receptive  the receptive field of every layer instead
--latex      symbolic totals in LaTeX
--json       for machines
"""

_SYMBOLS = {"filters": "NF", "colours": "NC"}
_COUNTS = ("weights", "biases", "outputs", "connections", "connections_exact", "multiply_adds")


def account(words: list[str]) -> int:
    """Print the table of a network's layers and totals."""
    if not words or words[0].startswith("--"):
        raise UserError(
            "account needs one MODEL: pool-upsample, conv-transpose, unet or package.module:Class"
        )
    (model, ours), groups = find_model(words[0]), grouped(words[1:])
    symbolic, as_json, latex, receptive = (
        switch(groups, name) for name in ("symbolic", "json", "latex", "receptive")
    )
    shape = _lengths("input", one(groups, "input", "HxWxNIC" if symbolic else "32x32x1"))
    given = groups.pop("at", None)
    at = None if given is None else [_lengths("at", word) for word in given]
    batch, dtype = number(groups, "batch", "100"), _dtype(one(groups, "dtype", "float32"))
    fields = model_fields(model, groups, re.findall(r"--([a-z]+)", USAGE))
    if symbolic and ours:
        fields = {**_SYMBOLS, **fields}
    if receptive:
        return _receptive(model, shape, fields, dtype, as_json)
    from optjax.accounting.account import account as count

    found = count(model, shape, batch=batch, dtype=dtype, **fields)
    if as_json:
        print(json.dumps(_as_json(found), indent=1))
        return 0
    there = _at(found, at) if found.symbols else []
    _show(found)
    if found.symbols:
        _show_totals(found, there, latex)
    if found.uncounted:
        print(f"not counted: {', '.join(found.uncounted)}")
    return 0


def _lengths(name: str, word: str) -> tuple[int | str, ...]:
    parts = [part.strip() for part in re.split("[x×,]", word)]
    for part in parts:
        if not re.fullmatch(r"\d{1,9}|[A-Za-z_]\w*", part) or keyword.iskeyword(part):
            raise UserError(
                f"--{name} is {word!r}: {part!r} is neither a number nor a name; "
                "expected lengths such as 32x32x1 or HxWxNIC"
            )
    return tuple(int(part) if part.isdigit() else part for part in parts)


def _dtype(word: str) -> Any:
    import jax.numpy as jnp

    try:
        return jnp.dtype(word)
    except TypeError:
        raise UserError(f"--dtype is {word!r}: expected one such as float32 or int32") from None


def _console() -> Any:
    from rich.console import Console

    # Off a terminal nobody's width is known, and a cut table is worth nothing.
    return Console(width=None if sys.stdout.isatty() else 200, highlight=False)


def _show(found: "Accounting") -> None:
    from rich import box
    from rich.table import Table

    from optjax.accounting.polynomials import text

    shape = " × ".join(map(str, found.input_shape))
    print(f"{found.name} on {shape}")
    columns = ("weights", "outputs", "connections") if found.symbols else _COUNTS
    extra = () if found.symbols else ("flops", "activation_bytes")
    table = Table(box=box.SIMPLE, pad_edge=False, show_footer=not found.symbols)
    table.add_column("layer", "all", overflow="fold")
    table.add_column("kind")
    table.add_column("output", justify="right")
    for column in (*columns, *extra):
        heading = {"connections_exact": "in the picture", "activation_bytes": "bytes"}
        table.add_column(
            heading.get(column, column.replace("_", "-")),
            text(found.total(column)) if not found.symbols else "",
            justify="left" if found.symbols else "right",
            overflow="fold",
        )
    for row in found.rows:
        if found.symbols and row.kind == "elementwise":
            continue
        numbers = (getattr(row, column) for column in (*columns, *extra))
        cells = ("" if n == 0 else text(n) for n in numbers)
        table.add_row(row.name, row.kind, "×".join(map(text, row.output)), *cells)
    _console().print(table)
    if not found.symbols:
        _say_totals(found)


def _say_totals(found: "Accounting") -> None:
    parameters = found.parameters
    print(f"parameters       {parameters:,} ({found.weights:,} weights, {found.biases:,} others)")
    print(f"multiply-adds    {found.multiply_adds:,} an example, forward")
    print(f"FLOPs            {found.flops:,} an example, forward")
    try:
        print(
            f"training step    {found.training_flops:,} FLOPs and about "
            f"{found.training_bytes / 2**20:,.1f} MiB with Adam, batch {found.batch}"
        )
    except UserError as error:
        print(f"training step    not counted: {error}")
        return
    if found.training_uncounted:
        print(f"not counted in a training step: {', '.join(found.training_uncounted)}")


def _at(
    found: "Accounting", sizes: list[tuple[int | str, ...]] | None
) -> list[tuple[str, "Accounting"]]:
    """Evaluate the account at these sizes of the picture (by default 32 and 64 pixels a side)."""
    names = list(dict.fromkeys(str(n) for n in found.input_shape[:-1] if not isinstance(n, int)))
    if not names:
        if sizes is not None:
            raise UserError("--at needs symbols for the picture's size, as --input HxWx3 has")
        return []
    there = []
    for lengths in [(side,) * len(names) for side in (32, 64)] if sizes is None else sizes:
        if len(lengths) != len(names) or not all(isinstance(n, int) for n in lengths):
            given = "x".join(map(str, lengths))
            raise UserError(f"--at is {given}: expected a number for each of {', '.join(names)}")
        put = dict(zip(names, (int(n) for n in lengths), strict=True))
        title = ", ".join(f"{name} = {n}" for name, n in put.items())
        try:
            there.append((title, found.at(**put)))
        except UserError:
            if sizes is not None:
                raise
    return there


def _show_totals(found: "Accounting", there: list[tuple[str, "Accounting"]], latex: bool) -> None:
    def show(of: "Accounting", columns: tuple[str, ...]) -> None:
        for column in columns:
            try:
                line = of.latex(column) if latex else of.text(column)
            except UserError as error:
                line = f"not counted: {error}"
            print(f"{column.replace('_', '-'):<18} {line}")

    show(found, (*_COUNTS, "parameters", "flops", "training_flops"))
    for size, put in there:
        print(f"\nat {size}")
        show(put, ("weights", "outputs", "connections", "multiply_adds"))
    conditions = [f"{s} a multiple of {m}" for s, m in found.multiples.items()]
    conditions += [f"{s} at least {least}" for s, least in found.least.items()]
    if conditions:
        print(f"\nfor {', '.join(conditions)}")


def _as_json(found: "Accounting") -> dict[str, Any]:
    def value(count: Any) -> Any:
        return count if isinstance(count, int) else str(count)

    def training(name: str) -> Any:
        try:
            return value(getattr(found, name))
        except UserError as error:
            return f"not counted: {error}"

    totals = (*_COUNTS, "parameters", "flops", "activation_bytes")
    document: dict[str, Any] = {
        "model": found.name,
        "input": [value(n) for n in found.input_shape],
        "batch": found.batch,
        "totals": {column: value(found.total(column)) for column in totals}
        | {"training_flops": training("training_flops")},
        "layers": [
            {
                key: value(v) if key not in ("name", "kind", "output") else v
                for key, v in row.items()
            }
            | {"output": [value(n) for n in row["output"]]}
            for row in (row._asdict() for row in found.rows)
        ],
        "not_counted": list(found.uncounted),
    }
    if found.symbols:
        document["multiples"] = {str(s): m for s, m in found.multiples.items()}
        document["least"] = {str(s): n for s, n in found.least.items()}
    else:
        document["totals"]["training_bytes"] = training("training_bytes")
    return document


def _receptive(
    model: Any, shape: tuple[int | str, ...], fields: dict[str, Any], dtype: Any, as_json: bool
) -> int:
    from rich import box
    from rich.table import Table

    from optjax.accounting.receptive_fields import receptive_fields
    from optjax.accounting.tracing import built

    if any(isinstance(v, str) for v in (*shape, *fields.values())):
        raise UserError("--receptive needs numbers: leave --symbolic and names out")
    seen = receptive_fields(built(model, fields) if fields else model, shape, dtype)  # type: ignore[arg-type]
    if as_json:
        document = [
            {
                "layer": field.name,
                "output": list(field.output),
                "axes": [
                    reach
                    and {
                        "size": reach.size,
                        "stride": float(reach.stride),
                        "offset": float(reach.offset),
                        "first": reach.first,
                        "last": reach.last,
                        "shift": reach.shift,
                    }
                    for reach in field.axes
                ],
            }
            for field in seen
        ]
        print(json.dumps(document, indent=1))
        return 0
    table = Table(box=box.SIMPLE, pad_edge=False)
    for heading in ("layer", "output", "receptive field", "effective stride", "offset"):
        table.add_column(heading, justify="left" if heading == "layer" else "right")
    for field in seen:
        cells = [
            " × ".join("?" if r is None else str(getattr(r, of)) for r in field.axes)
            for of in ("size", "stride", "offset")
        ]
        table.add_row(field.name, "×".join(map(str, field.output)), *cells)
    _console().print(table)
    print("pixels of the input; the offset is that of output 0's middle from pixel 0's")
    if any(reach is None for field in seen for reach in field.axes):
        print("?: all of the picture along that axis, or not known")
    return 0
