"""Problems that the command line knows by name; a user's own is package.module:function."""

import inspect
import os
import typing
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from optjax.cli.words import module_of, typed
from optjax.colourisation import networks
from optjax.support.errors import UserError, nearest


def least_squares(n: int = 256, d: int = 64, noise: float = 0.5, data_seed: int = 0):
    """Draw standard normal X (n, d) and t = Xw + noise, w standard normal over √d."""
    from optjax.run.problems import least_squares

    _at_least(1, n=n, d=d)
    _at_least(0, data_seed=data_seed)
    if n * d > 10**9:
        raise UserError(f"n × d is {n * d:,}: expected at most 10⁹ numbers")
    rng = np.random.default_rng(data_seed)
    X = rng.normal(size=(n, d))
    t = X @ rng.normal(size=d) / np.sqrt(d) + noise * rng.normal(size=n)
    return least_squares(X.astype(np.float32), t.astype(np.float32))


def quadratic(d: int = 100, power: float = 1.0, noise: float = 0.0):
    """Make ½ Σ h w², h_i = i^−power, w₀ = 1, gradients' standard deviation noise · √h."""
    from optjax.run.problems import quadratic

    _at_least(1, d=d)
    if d > 10**8:
        raise UserError(f"d is {d:,}: expected at most 10⁸")
    h = np.arange(1, d + 1, dtype=np.float32) ** -np.float32(power)
    return quadratic(h, np.ones(d, np.float32), noise=np.float32(noise) * np.sqrt(h))


def _colouring(model: str) -> Callable[..., Any]:
    def problem(
        data: str = "",
        palette: str = "",
        filters: int = 32,
        colours: int = 24,
        size: int = 32,
        pictures: int = 0,
        data_seed: int = 0,
    ):
        from optjax.colourisation.palette import grey, kmeans_palette, load_palette, nearest_colour
        from optjax.colourisation.pictures import load_pictures
        from optjax.colourisation.problem import colourisation_problem

        _at_least(0, data_seed=data_seed, pictures=pictures)
        net = networks.model(model, filters=filters, colours=colours)
        found = load_pictures(data or None, size=size, seed=data_seed)
        train, held_out = found.train, found.validation
        if pictures:
            chosen = np.random.default_rng(data_seed).permutation(len(train))[:pictures]
            train = train[np.sort(chosen)]
        if palette:
            colour_table = load_palette(palette, colours)
        else:
            colour_table = kmeans_palette(train, colours, data_seed)
        seen, kept = ((grey(p), nearest_colour(p, colour_table)) for p in (train, held_out))
        return colourisation_problem(net, seen, kept)

    problem.__name__ = model
    return problem


PROBLEMS: dict[str, Callable[..., Any]] = {
    "least-squares": least_squares,
    "quadratic": quadratic,
    **{name: _colouring(name) for name in ("pool-upsample", "conv-transpose", "unet")},
}


def find_problem(name: str) -> Callable[..., Any]:
    """Find the function that makes a problem.

    Raises:
      UserError: no such name, or it does not import.
    """
    if name in PROBLEMS:
        return PROBLEMS[name]
    if ":" not in name:
        hint = nearest(name, PROBLEMS)
        raise UserError(f"unknown PROBLEM {name!r}; {hint}; your own is package.module:function")
    return imported("PROBLEM", name)


def find_optimizer(name: str) -> Callable[..., Any]:
    """Find a factory of optax or optax.contrib by its name, or package.module:function.

    Raises:
      UserError: no such factory.
    """
    if ":" in name:
        return imported("--optimizer", name)
    known = factories()
    if name not in known:
        hint = nearest(name, known)
        raise UserError(f"unknown --optimizer {name!r}; {hint}; or package.module:function")
    return known[name]


def factories() -> dict[str, Callable[..., Any]]:
    """Return optax's optimisers by name; without those that it deprecates for a second version."""
    import optax

    found: dict[str, Callable[..., Any]] = {}
    for key, value in [*vars(optax.contrib).items(), *vars(optax).items()]:
        if key.startswith(("_", "scale_by")) or hasattr(optax, f"{key}_v2"):
            continue
        if inspect.isfunction(value) and "learning_rate" in inspect.signature(value).parameters:
            found[key] = value
    return found


def imported(what: str, name: str) -> Callable[..., Any]:
    """Import package.module:function; the working directory is searched, too."""
    module, attribute = module_of(what, name)
    found = getattr(module, attribute, None)
    if not callable(found):
        names = [n for n in vars(module) if not n.startswith("_")]
        raise UserError(f"{what} {name!r}: no function {attribute!r}; {nearest(attribute, names)}")
    return found


def arguments(
    function: Callable[..., Any], groups: Mapping[str, list[str]]
) -> dict[str, list[Any]]:
    """Parse the words given for a function's own arguments, as values of their types.

    Several by commas are several values, unless the type is a tuple or they name a file.

    >>> arguments(quadratic, {"d": ["8,16"], "noise": ["0.1"]})
    {'d': [8, 16], 'noise': [0.1]}
    """
    try:
        hints, taken = typing.get_type_hints(function), inspect.signature(function).parameters
    except (TypeError, ValueError, NameError):
        hints, taken = {}, {}
    found = {}
    for name in taken:
        if name in groups:
            kind, words = hints.get(name, str), groups[name]
            one = typing.get_origin(kind) is tuple or len(words) != 1 or os.path.exists(words[0])
            each = [words] if one else [[word] for word in words[0].split(",") if word]
            found[name] = [typed(name, kind, word) for word in each or [words]]
    return found


def made(name: str, make: Callable[..., Any], given: dict[str, Any]) -> Any:
    """Call the function of a PROBLEM.

    Raises:
      UserError: an argument is missing, or the function fails.
    """
    try:
        taken = inspect.signature(make)
    except (TypeError, ValueError):
        raise UserError(f"PROBLEM {name!r} is no function that makes a problem") from None
    try:
        taken.bind(**given)
    except TypeError as error:
        raise UserError(f"PROBLEM {name!r}: {error}; give it as --NAME VALUE") from None
    try:
        return make(**given)
    except UserError:
        raise
    except Exception as error:
        line = " ".join(str(error).split())[:200]
        raise UserError(f"PROBLEM {name!r} failed: {type(error).__name__}: {line}") from error


def _at_least(least: int, **values: int) -> None:
    for name, value in values.items():
        if value < least:
            raise UserError(f"{name} is {value}: expected at least {least}")
