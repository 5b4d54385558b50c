"""A network named on the command line, and its constructor's arguments."""

import dataclasses
import inspect
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from optjax.cli.words import module_of, one, typed, whole
from optjax.support.errors import UserError, nearest


def find_model(name: str) -> tuple[Any, bool]:
    """Find a network by its name or as package.module:Class, and whether it is one of ours.

    Raises:
      UserError: it is unknown, does not import, or is no Flax module.
    """
    from optjax.colourisation.networks import MODELS

    if ":" not in name:
        if name not in MODELS:
            hint = nearest(name, MODELS)
            raise UserError(f"unknown MODEL {name!r}; {hint}; your own is package.module:Class")
        return MODELS[name], True
    module, attribute = module_of("MODEL", name)
    if not hasattr(module, attribute):
        names = [n for n in vars(module) if not n.startswith("_")]
        raise UserError(f"MODEL {name!r}: no {attribute!r} there; {nearest(attribute, names)}")
    model = getattr(module, attribute)
    from flax import linen, nnx

    kinds = (linen.Module, nnx.Module)
    if not isinstance(model, linen.Module) and not (
        isinstance(model, type) and issubclass(model, kinds)
    ):
        raise UserError(f"MODEL {name!r} is no Flax module: expected a Linen or NNX class")
    return model, False


def model_fields(
    model: Any, groups: Mapping[str, list[str]], options: Sequence[str]
) -> dict[str, Any]:
    """Parse a model's constructor arguments from the words given for each.

    Args:
      model: a class. groups: for each argument its words. options: other options, for the hint.

    Raises:
      UserError: no such argument, or words that are not of its type.
    """
    if not groups:
        return {}
    if not isinstance(model, type):
        raise UserError(f"--{next(iter(groups))}: MODEL is made already and takes no arguments")
    known, hints = _parameters(model), typing.get_type_hints(model.__init__)
    if dataclasses.is_dataclass(model):
        hints |= typing.get_type_hints(model)
    fields = {}
    for name, words in groups.items():
        if name not in known:
            raise UserError(f"unknown option '--{name}'; {nearest(name, [*known, *options])}")
        fields[name] = _field(name, words, hints.get(name))
    return fields


def _field(name: str, words: list[str], hint: Any) -> Any:
    """Parse a value of the field's type, or a symbol for a whole number or an unknown type."""
    if hint in (int, int | None, Any, None):
        word = one({name: list(words)}, name)
        return word if word.isidentifier() else whole(name, word)
    if hint in (bool, float) or typing.get_origin(hint) is tuple:
        return typed(name, hint, words)
    kind = getattr(hint, "__name__", str(hint))
    raise UserError(
        f"--{name} is of type {kind}: numbers, true, false and symbols of whole numbers can be "
        "given here; for others write a class without arguments"
    )


def _parameters(model: Any) -> list[str]:
    """List the names of the constructor's arguments."""
    taken = list(inspect.signature(model.__init__).parameters.values())[1:]
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [p.name for p in taken if p.kind in kinds and p.name not in ("parent", "name", "rngs")]
