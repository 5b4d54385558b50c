"""Counts in symbols as text and LaTeX: expanded, collected by the size of the picture."""

from collections.abc import Sequence
from typing import Any

import sympy

from optjax.accounting.operations import Dim

Expr = Any  # sympy's own annotations are too wide to be of use
_RAISED = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")


def text(value: Dim, sizes: Sequence[sympy.Symbol] = ()) -> str:
    """Format an expression as people write it, collected by `sizes`.

    >>> h, c = sympy.symbols("h c")
    >>> text(sympy.expand(h**2 * (3 * c + c**2 / 2) + c), [h])
    'h²·(c²/2 + 3·c) + c'
    >>> text(20 * h - 6400)
    '20·h − 6400'
    >>> text(1234567)
    '1,234,567'
    """
    if isinstance(value, int) or value.is_Integer:
        return f"{int(value):,}"
    return " + ".join(
        _sum(factor) if monomial == 1 else f"{_product(monomial)}·({_sum(factor)})"
        for monomial, factor in _collected(value, sizes)
    ).replace("+ −", "− ")


def latex(value: Dim, sizes: Sequence[sympy.Symbol] = ()) -> str:
    """Format an expression in LaTeX, collected by `sizes`.

    >>> h, c = sympy.symbols("h c")
    >>> latex(h**2 * (3 * c + c**2), [h])
    'h^{2} \\\\left(c^{2} + 3 c\\\\right)'
    """
    if isinstance(value, int):
        return str(value)
    return " + ".join(
        sympy.latex(factor)
        if monomial == 1
        else rf"{sympy.latex(monomial)} \left({sympy.latex(factor)}\right)"
        for monomial, factor in _collected(value, sizes)
    ).replace("+ -", "- ")


def _collected(value: Expr, sizes: Sequence[sympy.Symbol]) -> list[tuple[Expr, Expr]]:
    """Return [(monomial in the sizes, its coefficient)], the highest degree first."""
    value = sympy.expand(value)
    used = [s for s in sizes if s in value.free_symbols]
    if not used or value.free_symbols <= set(used) or not value.is_polynomial(*used):
        return [(sympy.Integer(1), value)]
    terms = sympy.Poly(value, *used).terms()
    return [
        (sympy.Mul(*(s**p for s, p in zip(used, powers, strict=True))), sympy.expand(factor))
        for powers, factor in sorted(terms, key=lambda term: (-sum(term[0]), term[0]))
    ]


def _sum(value: Expr) -> str:
    """Format a sum as text."""
    terms = value.as_ordered_terms() if isinstance(value, sympy.Add) else [value]
    return " + ".join(map(_product, terms)).replace("+ −", "− ")


def _product(term: Expr) -> str:
    """Format a product as text."""
    number, rest = term.as_coeff_Mul()
    if rest == 1:
        return str(number).replace("-", "−")
    factors = [_power(factor) for factor in sympy.Mul.make_args(rest)]
    top = "" if abs(number.p) == 1 else f"{abs(number.p)}·"
    below = "" if number.q == 1 else f"/{number.q}"
    return ("−" if number < 0 else "") + top + "·".join(sorted(factors)) + below


def _power(factor: Expr) -> str:
    """Format a power as text."""
    base, power = factor.as_base_exp()
    if power == 1:
        return str(base)
    return f"{base}{str(power).translate(_RAISED)}" if power.is_Integer else str(factor)
