"""Any Flax model as a problem: Linen by its init and apply, NNX by split and merge."""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from optjax.run.batching import Batch, masked_mean
from optjax.run.problems import Data, Metrics, Problem
from optjax.support.errors import UserError
from optjax.support.types import Array, HParams, Key, PyTree

PerExampleLoss = Callable[[PyTree, PyTree], Array]
Score = Callable[[PyTree, PyTree], Mapping[str, Array]]


def _taken(module: type, flags: Mapping[str, Any]) -> dict[str, Any]:
    """Select the flags that the module's ``__call__`` takes."""
    taken = inspect.signature(module.__call__).parameters
    return {name: value for name, value in flags.items() if name in taken}


def _needs_mask(module: type) -> None:
    if "mask" not in inspect.signature(module.__call__).parameters:
        raise UserError(
            f"{module.__name__} has batch statistics and a batch may have empty slots: let its "
            "__call__ take `mask`, or fix the size by max_batch_size (for 'epochs', a divisor of n)"
        )


@dataclasses.dataclass(frozen=True)
class _Linen:
    """A Linen module as (init, apply), hashable; equal modules give equal objects."""

    model: Any

    def init(self, key: Key, inputs: Array) -> tuple[PyTree, PyTree]:
        variables = dict(self.model.init(key, inputs, **self._flags(train=False, mask=None)))
        params = variables.pop("params", {})
        return params, variables

    def apply(self, params, state, inputs, *, train: bool, mask=None, key=None):
        if mask is not None and "batch_stats" in state:
            _needs_mask(type(self.model))
        mutable = list(state) if train else False
        out = self.model.apply(
            {"params": params, **state},
            inputs,
            mutable=mutable,
            rngs=None if key is None else {"dropout": key},
            **self._flags(train=train, mask=mask),
        )
        return out if train else (out, state)

    def _flags(self, train: bool, mask: Array | None) -> dict[str, Any]:
        flags = {"train": train, "training": train, "deterministic": not train, "mask": mask}
        return _taken(type(self.model), flags)


@dataclasses.dataclass(frozen=True)
class _NNX:
    """A factory of NNX modules as (init, apply), by split and merge."""

    factory: Callable[[Any], Any]

    def init(self, key: Key, inputs: Array) -> tuple[PyTree, PyTree]:
        from flax import nnx

        _, params, state = nnx.split(self.factory(nnx.Rngs(key)), nnx.Param, ...)
        return params, state

    def apply(self, params, state, inputs, *, train: bool, mask=None, key=None):
        from flax import nnx

        module = nnx.merge(self._graph(), params, state, copy=True)
        module.train() if train else module.eval()
        if mask is not None and jax.tree.leaves(nnx.state(module, nnx.BatchStat)):
            _needs_mask(type(module))
        out = module(inputs, **_taken(type(module), {"mask": mask}))
        return out, (nnx.split(module, nnx.Param, ...)[2] if train else state)

    def _graph(self) -> Any:
        from flax import nnx

        return nnx.split(nnx.eval_shape(lambda: self.factory(nnx.Rngs(0))), nnx.Param, ...)[0]


def boundary(model: Any) -> _Linen | _NNX:
    """Wrap a Flax model: `init(key, inputs) → (params, state)`, `apply(params, state, inputs)`.

    Args:
      model: a Linen module; or, for NNX, a function of `nnx.Rngs` that builds the module.

    Raises:
      UserError: the model is neither.
    """
    from flax import linen, nnx

    if isinstance(model, nnx.Module) or not callable(model):
        raise UserError(
            f"model is a {type(model).__name__}: expected a Linen module, or a function of "
            "nnx.Rngs that builds an NNX one (for instance its class)"
        )
    return _Linen(model) if isinstance(model, linen.Module) else _NNX(model)


@dataclasses.dataclass(frozen=True)
class _Supervised:
    """Loss, objective and metrics of a supervised network."""

    net: _Linen | _NNX
    per_example: PerExampleLoss
    score: Score | None
    chunk: int

    def init(self, key: Key, data: Data) -> tuple[PyTree, PyTree]:
        return self.net.init(key, data.examples["inputs"][:1])

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

    def __call__(self, *args: Any) -> Any:
        return getattr(self.of, self.name)(*args)


def flax_problem(
    model: Any,
    inputs: ArrayLike,
    targets: ArrayLike,
    loss: PerExampleLoss,
    *,
    validation: tuple[ArrayLike, ArrayLike] | None = None,
    score: Score | None = None,
    chunk: int = 100,
) -> Problem:
    """Make a problem of training a Flax model: the mean of `loss(output, target)` over a batch.

    Args:
      model: a Linen module; or, for NNX, a function of `nnx.Rngs` that builds the module (a run's
        key then decides its initial weights). Mutable state (batch statistics) is carried. A
        Linen module's ``__call__`` may take ``train`` or ``training`` (True while training),
        ``deterministic`` (False then) and ``mask`` ((B,) bool: the examples of a batch that count,
        for its batch statistics).
      inputs: (n, ...) of the training examples.
      targets: (n, ...) of the training examples.
      loss: (outputs (B, ...), targets (B, ...)) → (B,), one value an example.
      validation: (inputs, targets) held out; their mean loss is recorded as ``validation_loss``.
      score: like `loss` but returns named (B,) values, recorded as ``validation_<name>``.
      chunk: examples evaluated at once outside training.

    Raises:
      UserError: inputs and targets of different lengths, no examples, NaN or infinity in float
        inputs, chunk below 1.

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


def _examples(which: str, inputs: ArrayLike, targets: ArrayLike) -> dict[str, Array]:
    x, y = jnp.asarray(inputs), jnp.asarray(targets)
    if x.ndim < 1 or y.ndim < 1 or x.shape[0] != y.shape[0]:
        raise UserError(
            f"{which} inputs have shape {x.shape} and targets {y.shape}: expected equal lengths"
        )
    if x.shape[0] == 0:
        raise UserError(f"{which} inputs have shape {x.shape}: expected at least one example")
    if jnp.issubdtype(x.dtype, jnp.floating) and not bool(jnp.all(jnp.isfinite(x))):
        raise UserError(f"{which} inputs hold NaN or infinity: expected finite numbers")
    return {"inputs": x, "targets": y}
