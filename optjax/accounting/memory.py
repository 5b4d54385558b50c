"""The memory that a traced program needs, before anything is allocated."""

from optjax.accounting.counts import size
from optjax.accounting.operations import Program

# Results that share their operand's memory, or that every compiler fuses into their readers.
_VIEWS = frozenset(
    "reshape squeeze expand_dims broadcast_in_dim stop_gradient scan_slice name iota".split()
)


def peak_bytes(program: Program) -> int:
    """Return the most bytes alive at once, in program order, each value until its last use.

    Arguments and results stay alive throughout. Nothing is fused, so an elementwise chain holds
    one array more than a compiled program would; the workspace of a convolution is left out.

    >>> import jax, jax.numpy as jnp
    >>> from optjax.accounting.operations import flatten
    >>> program = flatten(jax.make_jaxpr(lambda x: jnp.sum(x * x))(jnp.ones(100, "float32")))
    >>> peak_bytes(program)  # x, x² and the sum
    804
    """
    owner = list(range(len(program.shapes)))
    for op in program.ops:
        if op.primitive in _VIEWS and op.ins and op.ins[0] is not None:
            owner[op.outs[0]] = owner[op.ins[0]]
    bytes_of = [
        size(shape) * item for shape, item in zip(program.shapes, program.itemsizes, strict=True)
    ]
    last = {}
    for index, op in enumerate(program.ops):
        for v in (*op.ins, *op.outs):
            if v is not None:
                last[owner[v]] = index
    kept = {owner[v] for v in (*program.ins, *program.outs)}
    ending: dict[int, list[int]] = {}
    for v, index in last.items():
        if v not in kept:
            ending.setdefault(index, []).append(v)
    alive = {owner[v] for v in program.ins}
    now = sum(bytes_of[v] for v in alive)
    peak = now
    for index, op in enumerate(program.ops):
        for v in op.outs:
            if owner[v] == v and v not in alive:
                alive.add(v)
                now += bytes_of[v]
        peak = max(peak, now)
        now -= sum(bytes_of[v] for v in ending.get(index, ()))
    return peak
