"""Problems: an initial point, a loss of a batch, and the data that both read.

A problem's functions take the data as an argument. So one compiled program serves every data set
of the same shape, and holds no data as constants.
"""

import dataclasses
import reprlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike

from optjax.run.batching import Batch, masked_mean
from optjax.support.errors import UserError
from optjax.support.types import Array, HParams, Key, PyTree

Metrics = dict[str, Array]


class Data(NamedTuple):
    """The data that a problem's functions read."""

    examples: PyTree  # every leaf (n, ...): batches are drawn from these
    shared: PyTree  # seen whole by every batch: held-out examples, constants


class LossFn(Protocol):
    """The training loss of a batch."""

    def __call__(
        self, params: PyTree, model_state: PyTree, batch: Batch, hparams: HParams, /
    ) -> tuple[Array, PyTree]:
        """Return the mean loss of the batch, (), and the new model_state."""
        ...


def _no_metrics(params: PyTree, model_state: PyTree, data: Data, hparams: HParams) -> Metrics:
    return {}


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """An optimisation problem, for `make_run`.

    Attributes:
      init: (key, data) → (params, model_state).
      loss: (params, model_state, batch, hparams) → (mean loss, new model_state), the mean over the
        slots that the mask counts.
      objective: (params, model_state, data, hparams) → () loss over all training data, the
        `final_loss` of a `Trajectory`.
      metrics: the same arguments → named scalars, taken at every record.
      data: examples and shared arrays, arguments of the compiled program.
      hparams: names of the hyperparameters that the problem itself reads; "example_weights" if its
        loss weighs examples by `Batch.weights`, as `masked_mean` can.
      weighted: whether `loss` takes counts as a mask (how often each of all n examples is drawn),
        as `masked_mean` does; a sweep then takes the faster of the two forms.
      name: for messages.

    Two problems with equal functions and data of equal shapes share one compiled program.
    """

    init: Callable[[Key, Data], tuple[PyTree, PyTree]]
    loss: LossFn
    objective: Callable[[PyTree, PyTree, Data, HParams], Array]
    data: Data = dataclasses.field(repr=False)
    metrics: Callable[[PyTree, PyTree, Data, HParams], Metrics] = _no_metrics
    hparams: frozenset[str] = frozenset()
    weighted: bool = False
    name: str = "problem"

    @property
    def n(self) -> int:
        """Number of training examples, 0 for a problem without any."""
        leaves = jax.tree.leaves(self.data.examples)
        return leaves[0].shape[0] if leaves else 0


def checked_init(found: Any) -> tuple[PyTree, PyTree]:
    """Check that a problem's init gives (params, model_state), and real numbers to train."""
    if not isinstance(found, tuple) or len(found) != 2:
        raise UserError(
            f"the problem's init gives {_kind(found)}: expected a pair (params, model_state); give "
            "() for a model without state"
        )
    leaves = jax.tree_util.tree_leaves_with_path(found[0])
    if not leaves:
        raise UserError("the problem has no parameters: expected at least one array to train")
    for path, leaf in leaves:
        dtype = jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.floating):
            name = jax.tree_util.keystr(path, simple=True, separator=".") or "the parameter"
            advice = (
                "hold its real and its imaginary part as two arrays"
                if jnp.issubdtype(dtype, jnp.complexfloating)
                else "start from floats, as jnp.zeros gives"
            )
            raise UserError(f"{name} is {dtype}: expected real floating numbers; {advice}")
    return jax.tree.map(jnp.asarray, found)


def checked_loss(found: Any) -> tuple[Array, PyTree]:
    """Check that a problem's loss gives (mean loss, model_state)."""
    if not isinstance(found, tuple) or len(found) != 2:
        raise UserError(
            f"the problem's loss gives {_kind(found)}: expected a pair (mean loss, model_state), "
            "model_state as init gave it, or () if there is none"
        )
    if jnp.shape(found[0]) != ():
        raise UserError(
            f"the problem's loss has shape {jnp.shape(found[0])}: expected one number, the mean "
            "over the batch: oj.masked_mean(values, batch.mask, batch.weights)"
        )
    return found


def _kind(value: Any) -> str:
    shape = f" of shape {value.shape}" if hasattr(value, "shape") else ""
    return f"a {'number' if shape == ' of shape ()' else type(value).__name__}{shape}"


def finite(name: str, value: ArrayLike, ndim: int) -> np.ndarray:
    """Convert a value to a floating NumPy array of `ndim` axes; of a tracer, check the shape.

    Raises:
      UserError: no real numbers, none at all, another number of axes, or NaN or infinity.

    >>> finite("x", [1, 2], 1).dtype
    dtype('float64')
    """
    expected = ("a number", "one axis", "two axes")[ndim]
    try:
        array = value if isinstance(value, Tracer) else np.asarray(value)
        if not jnp.issubdtype(array.dtype, jnp.floating):
            if not np.can_cast(array.dtype, float, "same_kind"):
                raise TypeError(array.dtype)
            array = array.astype(float)
    except (TypeError, ValueError):
        raise UserError(
            f"{name} is {reprlib.repr(value)}: expected real numbers, {expected}"
        ) from None
    if array.ndim != ndim:
        raise UserError(f"{name} has shape {array.shape}: expected {expected}; reshape it")
    if not array.size:
        raise UserError(f"{name} has shape {array.shape}: expected at least one number")
    if not isinstance(array, Tracer) and not np.all(np.isfinite(array)):
        where = tuple(int(i) for i in np.argwhere(~np.isfinite(array))[0])
        at = f" at {where}" if ndim else ""
        raise UserError(
            f"{name} holds {array[where]}{at}: expected finite numbers; remove or correct it"
        )
    return array  # pyright: ignore[reportReturnType] - a tracer


def numbers(name: str, value: ArrayLike, ndim: int, dtype: Any = None) -> Array:
    """Convert a value as `finite` does, to a JAX array."""
    return jnp.asarray(finite(name, value, ndim), dtype)


def least_squares(
    X: ArrayLike, t: ArrayLike, w0: ArrayLike | None = None, scale: float = 1.0
) -> Problem:
    """Make a linear least-squares problem, loss(w) = scale · ‖Xw − t‖² / n.

    Args:
      X: (n, d) examples.
      t: (n,) targets.
      w0: (d,) start; zeros by default.
      scale: factor of the loss; ½ for the source's ½(xᵀw − t)².

    The loss of a batch is the mean over its b examples. X, t and w0 may be traced: `vmap` a
    function that builds the problem to run many at once.

    Raises:
      UserError: shapes that do not fit (both named), NaN or infinity.

    >>> import jax, optax, optjax as oj
    >>> problem = oj.least_squares([[2.0, 1.0]], [2.0])
    >>> run = oj.make_run(problem, optax.sgd, steps=50)
    >>> [round(float(w), 3) for w in run({"learning_rate": 0.05}, jax.random.key(0)).params]
    [0.8, 0.4]

    The gradient is that of the **mean square**: (2/n)Xᵀ(Xw − t). A text that steps along
    (1/b)Σ(wᵀx − t)x uses half of this gradient: give scale=0.5 to use the text's learning rates.
    """
    x, y = numbers("X", X, 2), numbers("t", t, 1)
    if x.shape[0] != y.shape[0]:
        raise UserError(f"X has shape {x.shape} and t {y.shape}: expected one t for each row of X")
    if not np.isfinite(scale):
        raise UserError(f"scale is {scale}: expected a finite number")
    dtype = np.promote_types(x.dtype, y.dtype)
    start = jnp.zeros(x.shape[1], dtype) if w0 is None else numbers("w0", w0, 1).astype(dtype)
    if start.shape[0] != x.shape[1]:
        raise UserError(f"X has shape {x.shape} and w0 {start.shape}: expected ({x.shape[1]},)")
    return Problem(
        init=_start_of_shared,
        loss=squares_loss,
        objective=_squares_objective,
        data=Data(
            {"x": x.astype(dtype), "t": y.astype(dtype)},
            {"w0": start, "scale": jnp.asarray(scale, dtype)},
        ),
        hparams=frozenset({"example_weights"}),
        weighted=True,
        name="least squares",
    )


def _start_of_shared(key: Key, data: Data) -> tuple[PyTree, PyTree]:
    return data.shared["w0"], ()


def squares_loss(w: Array, state: PyTree, batch: Batch, hparams: HParams) -> tuple[Array, PyTree]:
    """Return the batch's mean of scale · (xᵀw − t)², and the state unchanged."""
    residual_B = batch.examples["x"] @ w - batch.examples["t"]
    return batch.shared["scale"] * masked_mean(residual_B**2, batch.mask, batch.weights), state


setattr(squares_loss, "masks", True)  # noqa: B010 - for `masking.check`: it averages by the mask


def _squares_objective(w: Array, state: PyTree, data: Data, hparams: HParams) -> Array:
    return data.shared["scale"] * jnp.mean((data.examples["x"] @ w - data.examples["t"]) ** 2)


def quadratic(
    H: ArrayLike, w0: ArrayLike, w_star: ArrayLike | None = None, noise: ArrayLike | None = None
) -> Problem:
    """Make a quadratic bowl, loss(w) = ½ (w − w*)ᵀH(w − w*), with optional gradient noise.

    Args:
      H: (d, d) symmetric curvature, or (d,) its diagonal.
      w0: (d,) start.
      w_star: (d,) minimiser; zeros by default.
      noise: (d,) standard deviation of the gradient's noise for one example, zeros by default; it
        is divided by √b, with b the hyperparameter `batch_size` (1 if absent).

    Raises:
      UserError: shapes that do not fit (both named), NaN or infinity.

    >>> import jax, optax, optjax as oj
    >>> run = oj.make_run(oj.quadratic([4.0, 1.0], w0=[1.0, 1.0]), optax.sgd, steps=1)
    >>> [float(w) for w in run({"learning_rate": 0.25}, jax.random.key(0)).params]
    [0.0, 0.75]
    """
    start = numbers("w0", w0, 1)
    curvature = numbers("H", H, 2 if np.ndim(H) == 2 else 1)
    d = start.shape[0]
    if curvature.shape not in {(d,), (d, d)}:
        raise UserError(
            f"H has shape {curvature.shape} and w0 {start.shape}: expected H {(d,)} or {(d, d)}"
        )
    centre = jnp.zeros_like(start) if w_star is None else numbers("w_star", w_star, 1)
    deviation = jnp.zeros_like(start) if noise is None else numbers("noise", noise, 1)
    for name, value in (("w_star", centre), ("noise", deviation)):
        if value.shape != start.shape:
            raise UserError(f"{name} has shape {value.shape} and w0 {start.shape}: expected equal")
    shared = {"H": curvature, "w0": start, "w_star": centre, "noise": deviation}
    shared = jax.tree.map(lambda a: a.astype(start.dtype), shared)
    return Problem(
        init=_start_of_shared,
        loss=_quadratic_loss,
        objective=_quadratic_objective,
        data=Data((), shared),
        hparams=frozenset({"batch_size"}),
        name="quadratic",
    )


def _bowl(w: Array, shared: Mapping[str, Array]) -> Array:
    offset, H = w - shared["w_star"], shared["H"]
    return 0.5 * offset @ (H * offset if H.ndim == 1 else H @ offset)


def _quadratic_loss(w: Array, state: PyTree, batch: Batch, hparams: HParams):
    shared = batch.shared
    size = jnp.asarray(hparams.get("batch_size", 1)).astype(w.dtype)
    xi = shared["noise"] * jax.random.normal(batch.key, w.shape, w.dtype) / jnp.sqrt(size)
    # Its value is 0 and its gradient ξ: the noise is in the gradient alone.
    term = xi @ (w - jax.lax.stop_gradient(w))
    return _bowl(w, shared) + term, state


def _quadratic_objective(w: Array, state: PyTree, data: Data, hparams: HParams) -> Array:
    return _bowl(w, data.shared)
