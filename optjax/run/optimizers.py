"""Additions to optax: finite derivatives through square roots, and plain weight decay.

Adam, AdaGrad, RMSProp with ε outside the root and the like divide by √v + ε. Where a gradient
coordinate has been exactly zero, v = 0 and d√v/dv = ∞ meets dv = 0: the derivative of a run by
any hyperparameter is NaN. The step is smooth there (m/(√v + ε) with m ∝ g, v ∝ g²), and taking
d√v/dv · 0 = 0 gives its derivative.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator
from functools import partial, wraps
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from jax.extend import core as jex_core

from optjax.support.errors import UserError
from optjax.support.types import Array, PyTree

Factory = Callable[..., optax.GradientTransformation]


_CONCRETE = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
    jax.errors.NonConcreteBooleanIndexError,
)


@contextlib.contextmanager
def no_tracer_decides(hparams: Iterable[str]) -> Iterator[None]:
    """Refuse a traced hyperparameter that decides the program; say in a line what optax refuses."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        said = str(error)
        # As a dict's key, or as the length of a range.
        used = "Tracer" in said or "scalar index" in said
        if not isinstance(error, _CONCRETE) and not used:
            if type(error) is ValueError:
                raise UserError(f"the optimiser refuses: {' '.join(said.split())}") from error
            raise
        raise UserError(
            f"one of {', '.join(hparams)} decides the optimiser's program, so it cannot be a "
            "hyperparameter: give it with functools.partial(factory, name=value)"
        ) from None


@jax.custom_jvp
def safe_sqrt(x: Array) -> Array:
    """Compute √x, with the derivative 0 where x is not above 0.

    Values are `jnp.sqrt`'s: NaN below 0. The derivative is finite there, so that a branch which
    `jnp.where` leaves out adds no NaN in reverse mode.

    >>> import jax
    >>> float(jax.grad(safe_sqrt)(0.0)), float(jax.grad(safe_sqrt)(4.0))
    (0.0, 0.25)
    """
    return jnp.sqrt(x)


@safe_sqrt.defjvp
def _safe_sqrt_jvp(primals, tangents):
    (x,), (dx,) = primals, tangents
    root = safe_sqrt(x)
    positive = x > 0
    slope = 0.5 / jnp.where(positive, root, jnp.ones_like(root))
    return root, jnp.where(positive, slope, jnp.zeros_like(root)) * dx


@jax.custom_jvp
def _safe_cbrt(x: Array) -> Array:
    """Compute ∛x, with the derivative 0 at 0, like `safe_sqrt`."""
    return jnp.cbrt(x)


@_safe_cbrt.defjvp
def _safe_cbrt_jvp(primals, tangents):
    (x,), (dx,) = primals, tangents
    root = _safe_cbrt(x)
    away = root != 0
    slope = 1 / (3 * jnp.where(away, root, jnp.ones_like(root)) ** 2)
    return root, jnp.where(away, slope, jnp.zeros_like(root)) * dx


def _whole_power(x: Array, n: Array) -> Array:
    """Compute xⁿ, with a whole n converted explicitly, as strict promotion demands."""
    return jax.lax.pow(x, n.astype(x.dtype) if jnp.issubdtype(n.dtype, jnp.integer) else n)


def _real_sqrt(x: Array) -> Array:
    """Compute `safe_sqrt`, or 0 below 0: reverse mode multiplies an unused branch by the root."""
    return safe_sqrt(jnp.where(x < 0, jnp.zeros_like(x), x))


_EXCHANGED = {"sqrt": _real_sqrt, "cbrt": _safe_cbrt, "pow": _whole_power}
"""Primitives of an optimiser's update and their replacements, equal to the bit for real roots."""


def differentiable(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Replace every root in a transformation's update by one like `safe_sqrt`.

    The update is traced, and its program is evaluated with the roots replaced. This takes any
    optax transformation, and keeps its values to the bit; branches and loops too. Only functions
    with a derivative of their own (`jax.custom_jvp`) stay as they are.

    >>> import jax, jax.numpy as jnp, optax
    >>> def first_step(lr):
    ...     tx = differentiable(optax.adam(lr))
    ...     g = jnp.array([0.0, 1.0])
    ...     return tx.update(g, tx.init(g))[0].sum()
    >>> bool(jnp.isfinite(jax.grad(first_step)(0.1)))
    True
    """
    inner = optax.with_extra_args_support(tx)
    parameters = inspect.signature(inner.update).parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())

    def takes(name: str) -> bool:
        # A line search refuses what it does not know.
        return name in parameters or (open_ended and name != "grad_fn")

    def init(params: PyTree) -> PyTree:
        with _as_optax_expects():
            return inner.init(params)

    def update(updates: PyTree, state: PyTree, params: PyTree = None, **extra: Any):
        taken = {name: value for name, value in extra.items() if takes(name)}

        def program(updates, state, params):
            return inner.update(updates, state, params, **taken)

        with _as_optax_expects():
            closed, shape = jax.make_jaxpr(program, return_shape=True)(updates, state, params)
            leaves = jax.tree.leaves((updates, state, params))
            out = _evaluate(closed.jaxpr, closed.consts, leaves)
        # A constant result is a Python number.
        return jax.tree.map(
            lambda s, o: jnp.asarray(o, s.dtype),
            shape,
            jax.tree.unflatten(jax.tree.structure(shape), out),
        )

    return optax.GradientTransformationExtraArgs(init, update)


@contextlib.contextmanager
def _as_optax_expects() -> Iterator[None]:
    """Allow implicit promotion, which optax relies on (`decay**count`) and a user may forbid."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def _evaluate(jaxpr: Any, consts: list[Any], args: list[Any]) -> list[Any]:
    """Evaluate a jaxpr with its roots replaced by safe ones, in inner programs too."""
    values: dict[Any, Any] = dict(
        zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True)
    )

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, jex_core.Literal) else values[atom]

    for eqn in jaxpr.eqns:
        inputs = [read(v) for v in eqn.invars]
        if eqn.primitive.name in _EXCHANGED:
            outputs = [_EXCHANGED[eqn.primitive.name](*inputs)]
        elif eqn.primitive.name in ("jit", "pjit"):
            inner = eqn.params["jaxpr"]
            outputs = _evaluate(inner.jaxpr, inner.consts, inputs)
        else:
            params = eqn.params
            if not eqn.primitive.name.startswith("custom_"):
                params = {name: _exchanged(value) for name, value in params.items()}
            outputs = eqn.primitive.bind(*inputs, **eqn.primitive.get_bind_params(params))
            outputs = outputs if eqn.primitive.multiple_results else [outputs]
        values.update(zip(eqn.outvars, outputs, strict=True))
    return [read(v) for v in jaxpr.outvars]


def _exchanged(value: Any) -> Any:
    """Replace the roots of a branch or of a loop's body; return other parameters as they are."""
    if type(value) is tuple:  # branches
        return tuple(map(_exchanged, value))
    if not isinstance(value, jex_core.ClosedJaxpr) or not _has_root(value.jaxpr):
        return value
    kinds = [jax.ShapeDtypeStruct(a.shape, a.dtype, weak_type=a.weak_type) for a in value.in_avals]
    return jax.make_jaxpr(lambda *args: _evaluate(value.jaxpr, value.consts, list(args)))(*kinds)


def _has_root(jaxpr: Any) -> bool:
    return any(
        eqn.primitive.name in _EXCHANGED
        or any(map(_has_root, jex_core.jaxprs_in_params(eqn.params)))
        for eqn in jaxpr.eqns
    )


def evaluated(params: PyTree, opt_state: PyTree) -> PyTree:
    """Return the parameters that the optimiser would be judged at.

    Those of the run; of a schedule-free optimiser, its average
    (`optax.contrib.schedule_free_eval_params`).
    """
    free = optax.contrib.ScheduleFreeState
    found = jax.tree.leaves(opt_state, is_leaf=lambda part: isinstance(part, free))
    states = [part for part in found if isinstance(part, free)]
    if len(states) != 1 or jax.tree.structure(states[0].z) != jax.tree.structure(params):
        return params
    with _as_optax_expects():
        judged = optax.contrib.schedule_free_eval_params(states[0], params)
    return jax.tree.map(lambda new, old: new.astype(old.dtype), judged, params)


def with_weight_decay(factory: Factory) -> Factory:
    """Add weight decay to a factory: its optimiser also decays the weights by λ a step.

    .. math:: w ← (1 − λ) w + u(∇L)

    λ is not multiplied by the learning rate (optax's decoupled decay is: there λ = η · wd). With
    gradient descent it equals the penalty λ̃‖w‖² for λ̃ = λ / (2η), step for step.

    Args:
      factory: an optax factory.

    Returns:
      A factory that takes λ by the keyword ``weight_decay``.

    >>> import jax.numpy as jnp, optax
    >>> tx = with_weight_decay(optax.sgd)(learning_rate=0.1, weight_decay=0.5)
    >>> w, g = jnp.array([2.0]), jnp.array([1.0])
    >>> round(float(tx.update(g, tx.init(w), w)[0][0]), 6)  # −0.1 · 1 − 0.5 · 2
    -1.1

    Source: Hanson and Pratt (1988); Loshchilov and Hutter (2019), proposition 1.
    """

    @wraps(factory)
    def decayed(*args: Any, weight_decay: Any, **kwargs: Any) -> optax.GradientTransformation:
        def decay(updates: PyTree, params: PyTree) -> PyTree:
            return jax.tree.map(lambda u, w: u - weight_decay * w, updates, params)

        return optax.chain(factory(*args, **kwargs), optax.stateless(decay))

    signature = inspect.signature(factory)
    extra = inspect.Parameter("weight_decay", inspect.Parameter.KEYWORD_ONLY)
    kept = [p for p in signature.parameters.values() if p.name != "weight_decay"]
    at = next((i for i, p in enumerate(kept) if p.kind == p.VAR_KEYWORD), len(kept))
    decayed.__signature__ = signature.replace(  # pyright: ignore[reportAttributeAccessIssue]
        parameters=[*kept[:at], extra, *kept[at:]]
    )
    return decayed


def _named(factory: Factory) -> list[inspect.Parameter]:
    bound = set(factory.keywords) if isinstance(factory, partial) else set()
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    named = inspect.signature(factory).parameters.values()
    return [p for p in named if p.kind in kinds and p.name not in bound]


def keywords(factory: Factory) -> set[str]:
    """Return the keyword names of a factory: the hyperparameters that it takes, without ``steps``.

    >>> sorted(keywords(partial(optax.sgd, momentum=0.9)))
    ['accumulator_dtype', 'learning_rate', 'nesterov']
    """
    return {p.name for p in _named(factory)} - {"steps"}


def takes_steps(factory: Factory) -> bool:
    """Tell whether a factory asks for ``steps``, the number of a run's steps.

    >>> takes_steps(optax.adam), takes_steps(lambda learning_rate, steps: optax.sgd(learning_rate))
    (False, True)
    """
    return any(p.name == "steps" for p in _named(factory))


def required(factory: Factory) -> set[str]:
    """Return the keyword names of a factory that have no default.

    >>> required(optax.rmsprop)
    {'learning_rate'}
    """
    empty = inspect.Parameter.empty
    return {p.name for p in _named(factory) if p.default is empty} - {"steps"}
