"""Turn data into HTML by the templates in `optjax/report/templates`."""

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def render(template: str, **values: Any) -> str:
    """Render a template; every value is escaped, and a missing one raises.

    >>> "<title>Sweep &lt;b&gt;</title>" in render(
    ...     "sweep.html.j2", title="Sweep <b>", counts="", figures=[], heads=[], rows=[], points=0
    ... )
    True
    """
    import jinja2  # here, since `optjax --help` does not need it

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("optjax.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(number=number, anchor=anchor, pairs=pairs, sentence=sentence)
    return environment.get_template(template).render(values)


def number(value: float, digits: int = 6) -> str:
    """Write a number to so many significant digits; to two where it is rounding error.

    >>> number(0.1 + 0.2), number(49728), number(1.23456789e-9), number(float("nan"))
    ('0.3', '49,728', '1.2e−9', 'nan')
    >>> number(1234.5, 3), number(999.9, 3), number(0.98765, 2)
    ('1,234', '1,000', '0.99')
    """
    if isinstance(value, int) or (abs(value) < 1e9 and value == int(value)):
        return f"{int(value):,}".replace("-", "−")
    if 10**digits <= abs(float(f"{value:.{digits}g}")) < 1e9:
        return f"{value:,.0f}".replace("-", "−")
    mantissa, _, exponent = f"{value:.{2 if abs(value) < 1e-6 else digits}g}".partition("e")
    return (f"{mantissa}e{int(exponent)}" if exponent else mantissa).replace("-", "−")


def in_line(value: Any) -> str:
    """Write a value as JSON holds it in one line.

    >>> in_line({"p": 1, "ends": [0.5, 2]})
    'p 1, ends [0.5, 2]'
    """
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {in_line(one)}" for name, one in value.items())
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(in_line, value))}]"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return number(value) if isinstance(value, int | float) else str(value)


def cut(text: str, most: int) -> str:
    """Shorten a text to so many characters, its last an ellipsis.

    >>> cut("minimum norm", 8), cut("norm", 8)
    ('minimum…', 'norm')
    """
    return text if len(text) <= most else text[: most - 1].rstrip() + "…"


def anchor(name: str) -> str:
    """Make a name fit for an element's id.

    >>> anchor("padding/kernel 4")
    'padding-kernel-4'
    """
    return name.replace("/", "-").replace(" ", "-")


def pairs(values: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """List a mapping's items, less each null that has its text under another name.

    >>> pairs({"loss": None, "loss_text": "nan"})
    [('loss_text', 'nan')]
    """
    return [(k, v) for k, v in values.items() if v is not None or f"{k}_text" not in values]


def sentence(text: str) -> tuple[str, str, str]:
    """Split a text after its first sentence.

    >>> sentence("It falls. Dots: runs.")
    ('It falls', '. ', 'Dots: runs.')
    """
    return text.partition(". ")


def data_uri(path: Path) -> str:
    """Encode a picture file as text that a page can hold."""
    return "data:image/svg+xml;base64," + base64.b64encode(path.read_bytes()).decode()
