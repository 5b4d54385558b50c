"""A hyperparameter that changes along a run, as an array that can be swept and differentiated."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from optjax.support.types import Array, PyTree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Piecewise:
    """A hyperparameter of K values over the T steps of a run, in place of one number.

    Each value is held for T/K steps: step t has values[⌊tK/T⌋]. With ``linear`` the values are
    knots, evenly spaced from the first step to the last, and interpolated between.

    Args:
      values: (K,); K divides T, unless ``linear`` (then K ≥ 2). May be traced.
      linear: interpolate.

    Raises:
      UserError: (by the run) K does not fit T, or the values are not a list of numbers.

    >>> import jax, optax, optjax as oj
    >>> problem = oj.least_squares([[2.0, 1.0], [0.0, 1.0]], [2.0, 1.0])
    >>> run = oj.make_run(problem, optax.sgd, steps=100)
    >>> falling = oj.Piecewise([0.3, 0.1, 0.03, 0.01])
    >>> slope = oj.hypergrad(run)({"learning_rate": falling}, jax.random.key(0))
    >>> slope.gradient["learning_rate"].values.shape
    (4,)
    """

    values: Array
    linear: bool = dataclasses.field(default=False, metadata={"static": True})

    def __post_init__(self) -> None:
        if isinstance(self.values, list | tuple) and all(map(np.isscalar, self.values)):
            object.__setattr__(self, "values", np.asarray(self.values, float))

    def at(self, step: Array, steps: int) -> Array:
        """Return the value at each given step of a run of `steps` steps; past its end, the last.

        >>> Piecewise(jnp.array([1.0, 2.0])).at(jnp.array([0, 1, 2, 3, 4]), 4).tolist()
        [1.0, 1.0, 2.0, 2.0, 2.0]
        >>> Piecewise(jnp.array([1.0, 2.0]), linear=True).at(jnp.array([0, 1, 2]), 3).tolist()
        [1.0, 1.5, 2.0]
        """
        values, step = jnp.asarray(self.values), jnp.minimum(step, steps - 1)
        count = values.shape[0]
        if not self.linear:
            return values[step // (steps // count)]
        place = step.astype(values.dtype) * ((count - 1) / max(steps - 1, 1))
        left = jnp.minimum(place.astype(jnp.int32), count - 2)
        share = place - left.astype(values.dtype)
        return values[left] * (1 - share) + values[left + 1] * share


def plain(tree: PyTree) -> PyTree:
    """Replace each schedule in a tree by its values.

    >>> plain({"learning_rate": Piecewise([0.1, 0.2])})["learning_rate"].tolist()
    [0.1, 0.2]
    """
    return jax.tree.map(
        lambda v: v.values if isinstance(v, Piecewise) else v,
        tree,
        is_leaf=lambda v: isinstance(v, Piecewise),
    )
