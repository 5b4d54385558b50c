"""Any Flax model as a problem: Linen by its init and apply, NNX by split and merge."""

import contextlib
import dataclasses
import inspect
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from optjax.run.batching import Batch, masked_mean
from optjax.run.problems import Data, Metrics, Problem
from optjax.support.errors import UserError
from optjax.support.keys import make_key
from optjax.support.types import Array, HParams, Key, PyTree

PerExampleLoss = Callable[[PyTree, PyTree], Array]
Score = Callable[[PyTree, PyTree], Mapping[str, Array]]


_ON = ("train", "training", "is_training", "is_train")
_OFF = ("deterministic", "use_running_average", "inference", "eval_mode")
"""Parameters of ``__call__`` that are True, or False, while training."""


def _taken(module: type, *, train: bool, mask: Array | None, rngs: Any = None) -> dict[str, Any]:
    """Select the arguments that the module's ``__call__`` takes."""
    known = dict.fromkeys(_ON, train) | dict.fromkeys(_OFF, not train)
    known |= {"mask": mask, "rngs": rngs}
    parameters = inspect.signature(module.__call__).parameters
    return {name: value for name, value in known.items() if name in parameters}


def _check_call(module: type) -> None:
    """Refuse a required argument that nobody gives; name a flag that keeps its default."""
    known = {*_ON, *_OFF, "mask", "rngs"}
    listed = ", ".join((*_ON, *_OFF, "mask"))
    parameters = list(inspect.signature(module.__call__).parameters.values())
    for parameter in parameters[2:]:  # after self and the inputs
        if parameter.name in known or parameter.kind in (
            parameter.VAR_POSITIONAL,
            parameter.VAR_KEYWORD,
        ):
            continue
        if parameter.default is parameter.empty:
            raise UserError(
                f"{module.__name__}.__call__ needs {parameter.name}: expected the inputs, and any "
                f"of {listed}; give it a default, or make it a field of the module"
            )
        if isinstance(parameter.default, bool) and not module.__module__.startswith("flax."):
            warnings.warn(
                f"{module.__name__}.__call__ has a flag {parameter.name} that is not known: it "
                f"stays {parameter.default}, in training and evaluation. Known are {listed}",
                stacklevel=4,
            )


def _needs_mask(module: type) -> None:
    if "mask" not in inspect.signature(module.__call__).parameters:
        raise UserError(
            f"{module.__name__} has batch statistics and a batch may have empty slots: let its "
            "__call__ take `mask`, or fix the size by max_batch_size (for 'epochs', a divisor of n)"
        )


def _no_dropout(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
    """Refuse a dropout that is on in evaluation: an interceptor of Linen's methods."""
    from flax import linen

    module = context.module
    if isinstance(module, linen.Dropout) and context.method_name == "__call__" and module.rate:
        given = kwargs.get("deterministic", args[1] if len(args) > 1 else None)
        if not (module.deterministic if given is None else given):
            raise UserError(
                "dropout is on in evaluation: let the model's __call__ take `train` or "
                "`deterministic` and give it to nn.Dropout"
            )
    return call(*args, **kwargs)


@dataclasses.dataclass(frozen=True, eq=False)
class _Linen:
    """A Linen module as (init, apply), hashable; equal modules give equal objects."""

    model: Any

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Linen):
            return False
        try:
            return self.model is other.model or bool(self.model == other.model)
        except ValueError:  # of fields that are arrays
            return False

    def __hash__(self) -> int:
        try:
            return hash(self.model)
        except TypeError:  # a field is a list, a dict or an array
            return hash(type(self.model))

    def check(self) -> None:
        """Check the arguments of the model's ``__call__``."""
        _check_call(type(self.model))

    def init(self, key: Key, inputs: PyTree) -> tuple[PyTree, PyTree]:
        flags = _taken(type(self.model), train=False, mask=None)
        variables = dict(self.model.init(key, inputs, **flags))
        params = variables.pop("params", {})
        return params, variables

    def apply(self, params, state, inputs, *, train: bool, mask=None, key=None):
        from flax import linen

        if mask is not None and "batch_stats" in state:
            _needs_mask(type(self.model))
        # A stream that has no key of its own draws from that of "params".
        rngs = {"params": make_key(0)}
        if key is not None:
            rngs = {"dropout": key, "params": jax.random.fold_in(key, 1)}
        with contextlib.nullcontext() if train else linen.intercept_methods(_no_dropout):
            out = self.model.apply(
                {"params": params, **state},
                inputs,
                mutable=list(state) if train else False,
                rngs=rngs,
                **_taken(type(self.model), train=train, mask=mask),
            )
        if not train:
            return out, state
        out, after = out
        # A collection that values are sown into grows at every call.
        kept = {
            name: after[name] if _alike(after[name], old) else old for name, old in state.items()
        }
        return out, kept


def _alike(a: PyTree, b: PyTree) -> bool:
    shapes = [jax.tree.map(jnp.shape, tree) for tree in (a, b)]
    return jax.tree.structure(a) == jax.tree.structure(b) and shapes[0] == shapes[1]


@dataclasses.dataclass(frozen=True)
class _NNX:
    """A factory of NNX modules as (init, apply), by split and merge."""

    factory: Callable[[Any], Any]

    def check(self) -> None:
        """Check the arguments of the module's ``__call__``."""
        from flax import nnx

        _check_call(type(nnx.eval_shape(lambda: self.factory(nnx.Rngs(0)))))

    def init(self, key: Key, inputs: PyTree) -> tuple[PyTree, PyTree]:
        from flax import nnx

        _, params, state = nnx.split(self.factory(nnx.Rngs(key)), nnx.Param, ...)
        return params, state

    def apply(self, params, state, inputs, *, train: bool, mask=None, key=None):
        from flax import nnx

        module = nnx.merge(self._graph(), params, state, copy=True)
        module.train() if train else module.eval()
        if mask is not None and jax.tree.leaves(nnx.state(module, nnx.BatchStat)):
            _needs_mask(type(module))
        rngs = nnx.Rngs(make_key(0) if key is None else key)
        out = module(inputs, **_taken(type(module), train=train, mask=mask, rngs=rngs))
        nnx.pop(module, nnx.Intermediate)  # values that were sown
        return out, (nnx.split(module, nnx.Param, ...)[2] if train else state)

    def _graph(self) -> Any:
        from flax import nnx

        return nnx.split(nnx.eval_shape(lambda: self.factory(nnx.Rngs(0))), nnx.Param, ...)[0]


def boundary(model: Any) -> _Linen | _NNX:
    """Wrap a Flax model: `init(key, inputs) → (params, state)`, `apply(params, state, inputs)`.

    Args:
      model: a Linen module; or, for NNX, a function of `nnx.Rngs` that builds the module.

    Raises:
      UserError: the model is neither, or its ``__call__`` needs an argument that is not known.
    """
    from flax import linen, nnx

    if isinstance(model, nnx.Module) or not callable(model):
        raise UserError(
            f"model is a {type(model).__name__}: expected a Linen module, or a function of "
            "nnx.Rngs that builds an NNX one (for instance its class)"
        )
    made = _Linen(model) if isinstance(model, linen.Module) else _NNX(model)
    made.check()
    return made


@dataclasses.dataclass(frozen=True)
class _Supervised:
    """Loss, objective and metrics of a supervised network."""

    net: _Linen | _NNX
    per_example: PerExampleLoss
    score: Score | None
    chunk: int

    def init(self, key: Key, data: Data) -> tuple[PyTree, PyTree]:
        return self.net.init(key, jax.tree.map(lambda a: a[:1], data.examples["inputs"]))

    def loss(self, params: PyTree, state: PyTree, batch: Batch, hparams: HParams):
        out, state = self.net.apply(
            params, state, batch.examples["inputs"], train=True, mask=batch.mask, key=batch.key
        )
        values_B = self._values(out, batch.examples["targets"])
        return masked_mean(values_B, batch.mask, batch.weights), state

    def _values(self, out: PyTree, targets: PyTree) -> Array:
        values_B = self.per_example(out, targets)
        expected = jax.tree.leaves(targets)[0].shape[:1]
        if values_B.shape != expected:
            raise UserError(
                f"loss gives shape {values_B.shape}: expected {expected}, one value an example "
                f"(targets have shape {jax.tree.leaves(targets)[0].shape})"
            )
        return values_B

    def objective(self, params: PyTree, state: PyTree, data: Data, hparams: HParams) -> Array:
        return self._means(params, state, data.examples, with_score=False)["loss"]

    def metrics(self, params: PyTree, state: PyTree, data: Data, hparams: HParams) -> Metrics:
        held_out = data.shared["validation"]
        if held_out is None:
            return {}
        means = self._means(params, state, held_out, with_score=True)
        return {f"validation_{name}": value for name, value in means.items()}

    def _means(self, params, state, examples, *, with_score: bool) -> Metrics:
        """Average in evaluation mode, by chunks, so that memory does not grow with n."""

        def sums(part: PyTree) -> Metrics:
            out, _ = self.net.apply(params, state, part["inputs"], train=False)
            values = {"loss": self._values(out, part["targets"])}
            if with_score and self.score is not None:
                values |= self.score(out, part["targets"])
            return {name: jnp.sum(v) for name, v in values.items()}

        n = jax.tree.leaves(examples)[0].shape[0]
        chunk = min(self.chunk, n)
        whole = n - n % chunk
        stacked = jax.tree.map(
            lambda a: a[:whole].reshape(whole // chunk, chunk, *a.shape[1:]), examples
        )
        total = jax.tree.map(lambda v: jnp.sum(v, axis=0), jax.lax.map(sums, stacked))
        if n % chunk:
            rest = sums(jax.tree.map(lambda a: a[whole:], examples))
            total = jax.tree.map(jnp.add, total, rest)
        return {name: value / n for name, value in total.items()}


@dataclasses.dataclass(frozen=True)
class _Method:
    """A bound method that compares by value, so that equal problems share a program."""

    of: _Supervised
    name: str

    masks = "traced"  # for `masking.check`: it averages by the mask, and refuses bad models

    def __call__(self, *args: Any) -> Any:
        return getattr(self.of, self.name)(*args)


def flax_problem(
    model: Any,
    inputs: PyTree,
    targets: PyTree,
    loss: PerExampleLoss,
    *,
    validation: tuple[PyTree, PyTree] | None = None,
    score: Score | None = None,
    chunk: int = 100,
) -> Problem:
    """Make a problem of training a Flax model: the mean of `loss(output, target)` over a batch.

    Args:
      model: a Linen module; or, for NNX, a function of `nnx.Rngs` that builds the module (a run's
        key then decides its initial weights). Mutable state (batch statistics) is carried; values
        that are sown are dropped. Its ``__call__`` may take ``train``, ``training`` or
        ``is_training`` (True while training), ``deterministic`` or ``use_running_average`` (False
        then), ``rngs`` (NNX) and ``mask`` ((B,) bool: the examples of a batch that count, for its
        batch statistics). Every stream of random numbers has a key, in evaluation a fixed one.
      inputs: (n, ...) of the training examples, or a tree of such arrays.
      targets: the same.
      loss: (outputs (B, ...), targets (B, ...)) → (B,), one value an example.
      validation: (inputs, targets) held out; their mean loss is recorded as ``validation_loss``.
      score: like `loss` but returns named (B,) values, recorded as ``validation_<name>``.
      chunk: examples evaluated at once outside training.

    Raises:
      UserError: inputs and targets of different lengths, no examples, NaN or infinity in float
        inputs, chunk below 1, an argument of ``__call__`` that nobody gives.

    >>> import jax, optax, flax.linen as nn, numpy as np, optjax as oj
    >>> x = np.linspace(-1, 1, 32, dtype=np.float32)[:, None]
    >>> squared = lambda out, target: ((out - target) ** 2).sum(-1)
    >>> problem = oj.flax_problem(nn.Dense(1), x, 3 * x, squared)
    >>> run = oj.make_run(problem, optax.adam, steps=300)
    >>> bool(run({"learning_rate": 0.05}, jax.random.key(0)).final_loss < 1e-2)
    True
    """
    net = boundary(model)
    if chunk < 1:
        raise UserError(f"chunk is {chunk}: expected at least 1")
    held_out = None if validation is None else _examples("validation", *validation)
    training = _examples("training", inputs, targets)
    of = _Supervised(net, loss, score, chunk)
    return Problem(
        init=_Method(of, "init"),
        loss=_Method(of, "loss"),
        objective=_Method(of, "objective"),
        metrics=_Method(of, "metrics"),
        data=Data(training, {"validation": held_out}),
        hparams=frozenset({"example_weights"}),
        name=type(model).__name__,
    )


def _examples(which: str, inputs: PyTree, targets: PyTree) -> dict[str, PyTree]:
    x, y = jax.tree.map(jnp.asarray, (inputs, targets))
    shapes = [a.shape for a in jax.tree.leaves(x)], [a.shape for a in jax.tree.leaves(y)]
    said = [str(s[0]) if len(s) == 1 else str(s) for s in shapes]
    lengths = {shape[:1] for part in shapes for shape in part}
    if not shapes[0] or not shapes[1] or len(lengths) != 1 or () in lengths:
        raise UserError(
            f"{which} inputs have shape {said[0]} and targets {said[1]}: expected equal lengths"
        )
    if (0,) in lengths:
        raise UserError(f"{which} inputs have shape {said[0]}: expected at least one example")
    for a in jax.tree.leaves(x):
        if jnp.issubdtype(a.dtype, jnp.floating) and not bool(jnp.all(jnp.isfinite(a))):
            raise UserError(f"{which} inputs hold NaN or infinity: expected finite numbers")
    return {"inputs": x, "targets": y}
