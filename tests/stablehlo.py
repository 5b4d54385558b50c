"""What an exported program holds, read off its StableHLO text: an independent account.

Calls and loops are multiplied out: a function counts once a call, a loop's body as often as the
constant says that its counter is compared with (once, where it is compared with anything else).
"""

import math
import re
from collections import Counter
from typing import NamedTuple

from jax.extend.mlir import ir
from jax.interpreters import mlir

COLLECTIVES = ("all_reduce", "all_gather", "all_to_all", "collective", "reduce_scatter")


class Content(NamedTuple):
    multiply_adds: int  # of convolutions and products; zeros that a dilation inserts left out
    as_written: int  # the same with those zeros
    bytes: int  # that convolutions and products read and write
    largest: int  # bytes of the largest value
    operations: Counter  # name → times
    custom_calls: set[str]
    dtypes: set[str]

    @property
    def collectives(self):
        return [name for name in self.operations if any(word in name for word in COLLECTIVES)]


def read(exported):
    """The content of a `jax.export.Exported`."""
    with mlir.make_ir_context():
        module = ir.Module.parse(exported.mlir_module())
        reader = _Reader({f.attributes["sym_name"].value: f for f in module.body.operations})
        found = reader.function("main")
    sums = (found.pop(name, 0) for name in ("multiply_adds", "as_written", "bytes"))
    return Content(*sums, reader.largest, found, reader.custom_calls, reader.dtypes)


class _Reader:
    def __init__(self, functions):
        self.functions, self.known = functions, {}
        self.largest, self.custom_calls, self.dtypes = 0, set(), set()

    def function(self, name):
        """Its operations by name, and its sums, each as often as one call has them."""
        if name not in self.known:
            self.known[name] = Counter()
            self.block(self.functions[name].regions[0], 1, self.known[name])
        return self.known[name]

    def block(self, region, times, found):
        for op in (inner.operation for block in region for inner in block.operations):
            name = op.name
            found[name] += times
            for value in op.results:
                if isinstance(value.type, ir.RankedTensorType):
                    self.dtypes.add(str(value.type.element_type))
                    self.largest = max(self.largest, _bytes(value.type))
            if name == "stablehlo.custom_call":
                self.custom_calls.add(op.attributes["call_target_name"].value)
            elif name == "func.call":
                for key, count in self.function(op.attributes["callee"].value).items():
                    found[key] += times * count
            elif name in ("stablehlo.convolution", "stablehlo.dot_general"):
                true, written = _convolution(op) if "conv" in name else _product(op)
                kinds = [value.type for value in (*op.operands, *op.results)]
                found["multiply_adds"] += times * true
                found["as_written"] += times * written
                found["bytes"] += times * sum(map(_bytes, kinds))
            turns = _turns(op) if name == "stablehlo.while" else 1
            for inner in op.regions:
                self.block(inner, times * turns, found)


def _bytes(kind):
    bits = re.search(r"\d+", str(kind.element_type))
    return math.prod(kind.shape) * max(1, int(bits.group()) // 8 if bits else 1)


def _turns(loop):
    """Of a loop that counts up to a constant."""
    compares = [op for op in loop.regions[0].blocks[0].operations if "compare" in op.name]
    if len(compares) != 1:
        return 1
    limit = compares[0].operands[1]
    found = None if isinstance(limit, ir.BlockArgument) else re.search(r"dense<(\d+)>", str(limit))
    return int(found.group(1)) if found else 1


def _shapes(op):
    return [value.type.shape for value in (*op.operands, op.results[0])]


def _product(op):
    (left, _, out), line = _shapes(op), str(op)
    (contracted,) = re.findall(r"contracting_dims = \[([\d, ]*)\]", line)
    count = math.prod(out) * math.prod(left[int(d)] for d in contracted.split(",") if d.strip())
    return count, count


def _convolution(op):
    """Every output meets every tap; where the input is dilated, every input does.

    An axis of n pixels between which zeros were inserted has n·k products of its own, and out·k
    as written.
    """
    (image, kernel, out), line = _shapes(op), str(op)
    (numbers,) = re.findall(r"dim_numbers = \[(.*?)\]x\[(.*?)\]->\[(.*?)\]", line)
    x, w, y = (numbers[i].split(", ") for i in range(3))
    written = math.prod(out) * math.prod(kernel) // kernel[w.index("o")]
    dilation = re.findall(r"lhs_dilate = \[(\d+), (\d+)\]", line)
    true = written
    for axis, d in enumerate(dilation[0] if dilation else ()):
        if int(d) > 1:
            true = true * image[x.index(str(axis))] // out[y.index(str(axis))]
    return true, written
