"""Hypergradient descent: an optimiser that moves its own hyperparameters downhill as it trains."""

import inspect
from collections.abc import Iterable
from functools import partial, wraps
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from optjax.run import core, optimizers
from optjax.support.errors import UserError, nearest
from optjax.support.types import Array, PyTree

Rule = Literal["additive", "multiplicative"]

# Factors of a running mean, by optax's names: they stay in [0, 1). All else stays at or above 0.
_FACTORS = frozenset({"momentum", "b1", "b2", "b3", "decay", "decay_rate", "rho"})


class OnlineState(NamedTuple):
    """What `hypergradient_descent` keeps from update to update."""

    hyperparams: dict[str, Array]  # () each, the parameters' dtype or float32: θ_t, last in use
    slopes: tuple[PyTree, ...]  # a tree like the parameters for each name of wrt: ∂u_t/∂θ
    inner: PyTree  # the state of the optimiser that is adapted


def hypergradient_descent(
    factory: optimizers.Factory,
    wrt: str | Iterable[str] = ("learning_rate",),
    rule: Rule = "additive",
) -> optimizers.Factory:
    """Make a factory whose optimisers adapt their hyperparameters θ at every update.

    With w_{t+1} = w_t + u_t(θ_t) and g_t = ∇L(w_t), the last update's effect on the loss is

    .. math:: h_t = g_t^⊤ \\frac{∂u_{t-1}}{∂θ}, \\qquad
              θ_t = θ_{t-1} - β h_t \\quad\\text{(additive)}, \\qquad
              θ_t = θ_{t-1} \\Bigl(1 - β \\frac{h_t}{‖g_t‖ ‖∂u_{t-1}/∂θ‖}\\Bigr)
              \\quad\\text{(multiplicative, 0/0 = 0)},

    the derivative at the optimiser's state held fixed. For gradient descent the additive rule is
    η_t = η_{t−1} + β g_t·g_{t−1}: the rate grows while successive gradients agree.

    Args:
      factory: an optax factory, `with_weight_decay` of one, or a `functools.partial` of either.
      wrt: the names of the hyperparameters to adapt; what is given for them is where they start.
      rule: ``"additive"``, β in units of θ²/L and so to be set for each problem, or
        ``"multiplicative"``, β free of units: a step changes θ by a share β at most (0.02, say),
        and a θ of 0 stays there.

    Returns:
      The factory: the same keyword names, and ``hyper_rate``, β for all of `wrt`, and
      ``hyper_rate_<name>`` for each name that is to have its own β. All may be traced, batched
      over and differentiated by. Their optimiser is an optax transformation whose state reads
      ``state.hyperparams[name]``, as that of `optax.inject_hyperparams` does.

    Raises:
      UserError: a name that the factory lacks or a partial has bound; an unknown rule; when the
        factory is called, a starting value that is no number or is out of its range.

    Factors of running means (``momentum``, ``b1``, ``b2``, ``decay``, …) are held in [0, 1), all
    other hyperparameters at or above 0, traced starting values too. The paper holds nothing, and
    an additive rate may then turn negative and climb. An ``eps`` held at 0 divides 0 by 0 where a
    gradient is zero: adapt it by the multiplicative rule. A name costs a copy of the parameters.

    What descends is the loss one step ahead, on the next batch. Greedy rates are far too small
    for long noisy runs (Wu et al. 2018, on short-horizon bias), and a weight decay moves by its
    effect on the training loss, not on data held out. For those, differentiate the whole run.

    >>> import jax, optax, optjax as oj
    >>> problem = oj.least_squares([[2.0, 1.0], [0.0, 1.0]], [2.0, 1.0])
    >>> run = oj.make_run(problem, hypergradient_descent(optax.sgd), steps=50)
    >>> hparams = {"learning_rate": 0.001, "hyper_rate": 0.01}
    >>> (state, records), = run.chunks(hparams, jax.random.key(0), 50)
    >>> bool(state.opt_state.hyperparams["learning_rate"] > 0.1)  # 100 times what it started from
    True
    >>> fixed = oj.make_run(problem, optax.sgd, steps=50)({"learning_rate": 0.001}, state.key)
    >>> bool(records.loss[-1] < 0.1 * fixed.loss[-1])
    True

    Source: Baydin, Cornish, Martínez Rubio, Schmidt and Wood (2018), "Online learning rate
    adaptation with hypergradient descent", ICLR, equations 4–8 and algorithms 4–6; the additive
    rule is Almeida, Langlois, Amaral and Plakhov's (1998). There θ is a learning rate; here it is
    whatever the factory names, and ∂u/∂θ comes of forward differentiation of the update.
    """
    names = _names(factory, wrt)
    if rule not in get_args(Rule):
        raise UserError(f"unknown rule {rule!r}: {nearest(str(rule), get_args(Rule))}")
    signature = inspect.signature(factory)

    @wraps(factory)
    def adapted(
        *args: Any, hyper_rate: Any, **kwargs: Any
    ) -> optax.GradientTransformationExtraArgs:
        own = {name: kwargs.pop(f"hyper_rate_{name}", None) for name in names}
        given = signature.bind(*args, **kwargs)
        given.apply_defaults()
        betas = {k: hyper_rate if beta is None else beta for k, beta in own.items()}
        for name in names:
            _check(name, given.arguments[name], rule)
            _number(f"the hyper_rate of {name}", betas[name])

        def build(theta: dict[str, Array]) -> optax.GradientTransformationExtraArgs:
            arguments = given.arguments | theta
            call = inspect.BoundArguments(signature, arguments)  # pyright: ignore[reportArgumentType]
            return optimizers.differentiable(factory(*call.args, **call.kwargs))

        def init(params: PyTree) -> OnlineState:
            dtype = core.hyper_dtype(params)
            theta = {name: jnp.asarray(given.arguments[name]).astype(dtype) for name in names}
            slopes = tuple(jax.tree.map(jnp.zeros_like, params) for _ in names)
            inner = jax.tree.map(jnp.asarray, build(theta).init(params))
            return OnlineState(theta, slopes, inner)

        def update(updates: PyTree, state: Any, params: PyTree = None, **extra: Any):
            theta = {
                name: _moved(name, rule, state.hyperparams[name], betas[name], updates, slope)
                for name, slope in zip(names, state.slopes, strict=True)
            }

            def step(theta: dict[str, Array]) -> tuple[PyTree, PyTree]:
                return build(theta).update(updates, state.inner, params, **extra)

            step_by, push, inner = jax.linearize(step, theta, has_aux=True)
            zero = jax.tree.map(jnp.zeros_like, theta)
            slopes = tuple(push(zero | {k: jnp.ones_like(theta[k])}) for k in names)
            # A float32 coefficient must not widen the state of a bfloat16 run.
            return step_by, jax.tree.map(
                lambda new, old: jnp.asarray(new, old.dtype),
                OnlineState(theta, slopes, inner),
                state,
            )

        return optax.GradientTransformationExtraArgs(init, update)

    kind, known = inspect.Parameter.KEYWORD_ONLY, [*signature.parameters.values()]
    rates = [inspect.Parameter("hyper_rate", kind)]
    rates += [inspect.Parameter(f"hyper_rate_{name}", kind, default=None) for name in names]
    at = next((i for i, p in enumerate(known) if p.kind == p.VAR_KEYWORD), len(known))
    adapted.__signature__ = signature.replace(  # pyright: ignore[reportAttributeAccessIssue]
        parameters=[*known[:at], *rates, *known[at:]]
    )
    return adapted


def _moved(name: str, rule: Rule, theta: Array, beta: Any, g: PyTree, slope: PyTree) -> Array:
    """θ after one step down its hypergradient, held in its range."""
    h, beta = _dot(g, slope, theta.dtype), jnp.asarray(beta).astype(theta.dtype)
    if rule == "multiplicative":
        lengths = [optimizers.safe_sqrt(_dot(a, a, theta.dtype)) for a in (g, slope)]
        scale = lengths[0] * lengths[1]
        none = scale == 0
        h = theta * jnp.where(none, jnp.zeros_like(h), h / jnp.where(none, 1.0, scale))
    theta = theta - beta * h
    # Not jnp.clip: at the very bound, where a weight decay may start, it has half the derivative.
    theta = jnp.where(theta < 0, jnp.zeros_like(theta), theta)
    if name in _FACTORS:
        below = jnp.ones_like(theta) - jnp.finfo(theta.dtype).epsneg
        theta = jnp.where(theta >= 1, below, theta)
    return theta


def _dot(a: PyTree, b: PyTree, dtype: Any) -> Array:
    leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    products = (jnp.sum(x.astype(dtype) * y.astype(dtype)) for x, y in leaves)
    return sum(products, jnp.zeros((), dtype))


def _names(factory: optimizers.Factory, wrt: str | Iterable[str]) -> tuple[str, ...]:
    if isinstance(factory, optax.GradientTransformation) or not callable(factory):
        raise UserError(
            f"factory is a {type(factory).__name__}: expected a factory, optax.adam and not "
            "optax.adam(0.1)"
        )
    names = tuple(dict.fromkeys([wrt] if isinstance(wrt, str) else wrt))
    if not names:
        raise UserError("wrt names no hyperparameter: give one at least, as in ('learning_rate',)")
    known = optimizers.keywords(factory)
    if "hyper_rate" in known:
        raise UserError(
            "factory takes a hyper_rate already: apply hypergradient_descent once, with every name"
        )
    for name in names:
        if name in known:
            continue
        if isinstance(factory, partial) and name in optimizers.keywords(factory.func):
            raise UserError(
                f"{name} is bound by functools.partial: leave it free, what adapts starts from "
                "the hyperparameters"
            )
        raise UserError(f"unknown hyperparameter {name!r} in wrt: {nearest(str(name), known)}")
    return names


def _number(name: str, value: Any) -> None:
    if isinstance(value, bool | str) or value is None or callable(value):
        raise UserError(f"{name} is {value!r}: expected a number, not a flag or schedule")
    if np.ndim(value):
        raise UserError(f"{name} has shape {np.shape(value)}: expected a number; vmap over several")


def _check(name: str, value: Any, rule: Rule) -> None:
    """Check a starting value, where it is known before the run."""
    _number(name, value)
    if isinstance(value, Tracer):
        return
    number = float(value)
    if not 0 <= number < (1 if name in _FACTORS else np.inf):
        span = "0 to below 1" if name in _FACTORS else "0 or more"
        raise UserError(f"{name} is {number:g}: expected {span}, the range it is held in")
    if rule == "multiplicative" and number == 0:
        raise UserError(f"{name} is 0, where the multiplicative rule stays: start above it")
