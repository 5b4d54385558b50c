"""Keys of one generator, whose draws are the same alone and under `vmap`."""

from typing import Any

import jax
import numpy as np

from optjax.support.errors import UserError
from optjax.support.types import Key

_GENERATOR = "threefry2x32"


def make_key(seed: int | jax.Array) -> Key:
    """Make the key of a seed: `jax.random.key` with threefry, whatever the user's default.

    >>> str(make_key(0).dtype)
    'key<fry>'
    """
    return jax.random.key(seed, impl=_GENERATOR)


def as_key(key: Any) -> Key:
    """Convert a whole number, a raw key or a key of threefry to the key of a run.

    Raises:
      UserError: none of these; or a generator whose draws change under `vmap`, as "rbg" does.

    >>> bool((jax.random.key_data(as_key(3)) == jax.random.key_data(make_key(3))).all())
    True
    """
    if not jax.config.jax_threefry_partitionable:  # pyright: ignore[reportAttributeAccessIssue]
        raise UserError(
            "jax_threefry_partitionable is off, so a small batch is not the beginning of a large "
            "one: leave it on, as it is by default"
        )
    if type(key) is int or isinstance(key, np.integer):
        return make_key(int(key))
    if not hasattr(key, "dtype") or not hasattr(key, "shape"):
        raise UserError(f"key is {key!r}: expected a key, as from jax.random.key(0), or a seed")
    if not jax.dtypes.issubdtype(key.dtype, jax.dtypes.prng_key):
        if key.dtype == np.uint32 and key.shape[-1:] == (2,):
            return jax.random.wrap_key_data(key, impl=_GENERATOR)
        raise UserError(
            f"key has dtype {key.dtype} and shape {key.shape}: expected a key, as from "
            "jax.random.key(0), or a seed"
        )
    if str(key.dtype) != "key<fry>":
        raise UserError(
            f"key is of the generator {jax.random.key_impl(key)}, whose draws change under vmap: "
            f"give a seed, or jax.random.key(0, impl='{_GENERATOR}')"
        )
    return key
