"""Flax models as people write them: every way of calling trains, sweeps and is judged rightly."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import freeze

import optjax as oj
from optjax.run.flax_models import boundary
from optjax.support.errors import UserError

RNG = np.random.default_rng(0)
X = RNG.normal(size=(12, 3)).astype(np.float32)
Y = (X @ np.array([[1.0], [-2.0], [0.5]])).astype(np.float32)
KEY = jax.random.key(0)
pytestmark = pytest.mark.filterwarnings("ignore:Using 'Module.sow")
quiet = {"progress": lambda *_: None}


def squared(out, target):
    return jnp.sum((out - target) ** 2, axis=-1)


def norm(x, off, mask=None):
    return nn.BatchNorm(use_running_average=off)(x, mask=None if mask is None else mask[:, None])


class Train(nn.Module):
    @nn.compact
    def __call__(self, x, train=False, mask=None):
        return nn.Dense(1)(nn.Dropout(0.5, deterministic=not train)(norm(x, not train, mask)))


class Training(nn.Module):
    @nn.compact
    def __call__(self, x, *, training, mask=None):
        return nn.Dense(1)(nn.Dropout(0.5)(norm(x, not training, mask), deterministic=not training))


class IsTraining(nn.Module):
    @nn.compact
    def __call__(self, x, is_training: bool, mask=None):
        return nn.Dense(1)(
            nn.Dropout(0.5, deterministic=not is_training)(norm(x, not is_training, mask))
        )


class Deterministic(nn.Module):
    @nn.compact
    def __call__(self, x, deterministic=True, mask=None):
        return nn.Dense(1)(nn.Dropout(0.5)(norm(x, deterministic, mask), deterministic))


class RunningAverage(nn.Module):
    @nn.compact
    def __call__(self, x, use_running_average: bool, mask=None):
        return nn.Dense(1)(norm(x, use_running_average, mask))


class Streams(nn.Module):
    """Draws of its own, under names of its own, also in evaluation."""

    @nn.compact
    def __call__(self, x, train=False):
        if train:
            x = x * jax.random.bernoulli(self.make_rng("drop_path"), 0.8, x.shape)
        return nn.Dense(1)(x) + 0 * jax.random.normal(self.make_rng("sample"), (1,))


class Sown(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(1)(x)
        self.sow("losses", "size", jnp.mean(x**2))
        self.sow("intermediates", "out", x)
        return x


class Listed(nn.Module):
    widths: list
    options: dict

    @nn.compact
    def __call__(self, x):
        for width in self.widths:
            x = nn.Dense(width, **self.options)(x)
        return x


class TwoInputs(nn.Module):
    @nn.compact
    def __call__(self, parts):
        return nn.Dense(1)(jnp.concatenate([parts["left"], parts["right"]], axis=-1))


class Plain(nnx.Module):
    def __init__(self, rngs):
        self.norm, self.drop = nnx.BatchNorm(3, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)
        self.out = nnx.Linear(3, 1, rngs=rngs)

    def __call__(self, x, mask=None):
        mask = None if mask is None else mask[:, None]
        return self.out(self.drop(self.norm(x, mask=mask)))


class WithTrain(Plain):
    def __call__(self, x, train, mask=None):
        mask = None if mask is None else mask[:, None]
        x = self.norm(x, use_running_average=not train, mask=mask)
        return self.out(self.drop(x, deterministic=not train))


class WithRngs(nnx.Module):
    def __init__(self, rngs):
        self.drop, self.out = nnx.Dropout(0.5), nnx.Linear(3, 1, rngs=rngs)

    def __call__(self, x, *, rngs):
        x = self.out(self.drop(x, rngs=rngs))
        self.sow(nnx.Intermediate, "seen", x)
        return x


class Sequence(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(3, 4, rngs=rngs), nnx.Linear(4, 1, rngs=rngs)])

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


CONVENTIONS = {
    "train": Train(),
    "training": Training(),
    "is_training": IsTraining(),
    "deterministic": Deterministic(),
    "use_running_average": RunningAverage(),
    "own streams": Streams(),
    "sown values": Sown(),
    "lists and dicts": Listed([4, 1], {"use_bias": False}),
    "Sequential": nn.Sequential([nn.Dense(4), nn.relu, nn.Dense(1)]),
    "inputs in a dict": TwoInputs(),
    "NNX": Plain,
    "NNX train": WithTrain,
    "NNX rngs": WithRngs,
    "NNX list": Sequence,
    "NNX function": lambda rngs: nnx.Linear(3, 1, rngs=rngs),
}
DROPS = {"train", "training", "is_training", "deterministic", "NNX", "NNX train", "NNX rngs"}


def inputs(name):
    return {"left": X[:, :1], "right": X[:, 1:]} if name == "inputs in a dict" else X


def run_of(name, steps=4):
    data = inputs(name), Y
    problem = oj.flax_problem(CONVENTIONS[name], *data, squared, validation=data)
    return oj.make_run(problem, optax.adam, steps, max_batch_size=4, record_every=2)


@pytest.fixture(autouse=True)
def as_flax_expects():
    standard, allow = jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow")
    with jax.enable_x64(False), standard, allow:
        yield


FEW = ("Sequential", "train", "own streams", "NNX train")


@pytest.mark.parametrize("batching", ["masked", pytest.param("static", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in FEW else pytest.mark.slow) for n in CONVENTIONS]
)
def test_it_trains_alone_and_in_a_sweep(name, batching):
    run = run_of(name)
    grid = {"learning_rate": [0.01], "batch_size": [2, 4]}
    alone = [run({"learning_rate": 0.01, "batch_size": b}, jax.random.key(1)) for b in (2, 4)]
    found = oj.sweep(run, grid, 2, batching=batching, **quiet)
    for one, loss in zip(alone, found.final_loss.values[0, :, 1], strict=True):
        np.testing.assert_allclose(one.final_loss, loss, rtol=2e-4)  # float32, after Adam
    assert np.isfinite(found.validation_loss.values).all()


@pytest.mark.parametrize("name", CONVENTIONS)
def test_training_and_evaluation_are_told_apart(name):
    problem = run_of(name).problem
    params, state = problem.init(KEY, problem.data)
    net = problem.loss.of.net
    given = inputs(name)
    evaluated = [net.apply(params, state, given, train=False)[0] for _ in range(2)]
    assert np.array_equal(*evaluated)
    keys = jax.random.split(KEY)
    trained = [net.apply(params, state, given, train=True, key=key) for key in keys]
    changes = not np.array_equal(trained[0][0], trained[1][0])
    assert changes == (name in {*DROPS, "own streams"} - {"NNX", "NNX train"})
    if name in DROPS | {"use_running_average"}:
        assert not np.allclose(trained[0][0], evaluated[0])
    assert jax.tree.structure(trained[0][1]) == jax.tree.structure(state)
    if name in {"train", "training", "is_training", "deterministic", "use_running_average"}:
        before, after = jax.tree.leaves(state), jax.tree.leaves(trained[0][1])
        assert any(not np.array_equal(a, b) for a, b in zip(before, after, strict=True))


MODES = ("forward", "reverse", "segmented", "recursive")
DIFFERENTIATED = ("train", "own streams", "lists and dicts", "NNX rngs")


@pytest.mark.parametrize(
    ("mode", "name"),
    [
        pytest.param(mode, name, marks=() if i == j < 2 else pytest.mark.slow)
        for i, mode in enumerate(MODES)
        for j, name in enumerate(DIFFERENTIATED)
    ],
)
def test_it_is_differentiated(name, mode):
    slope = oj.hypergrad(run_of(name), "validation_loss", "learning_rate", mode)
    found = slope({"learning_rate": 0.01, "batch_size": 2}, KEY)
    assert found.finite
    assert found.gradient["learning_rate"] != 0


def test_frozen_parameters_are_initial_parameters():
    run = run_of("Sequential")
    params = run.problem.init(KEY, run.problem.data)[0]
    point = {"learning_rate": 0.01}
    given = [run({**point, "initial_params": p}, KEY) for p in (params, freeze(params))]
    assert given[0].final_loss == given[1].final_loss


def test_equal_models_share_a_program_though_a_list_is_in_them():
    models = [Listed([4, 1], {"use_bias": False}) for _ in range(2)]
    assert boundary(models[0]) == boundary(models[1])
    assert hash(boundary(models[0])) == hash(boundary(models[1]))
    assert boundary(models[0]) != boundary(Listed([5, 1], {"use_bias": False}))


class NeedsMore(nn.Module):
    @nn.compact
    def __call__(self, x, temperature):
        return nn.Dense(1)(x) / temperature


class OddFlag(nn.Module):
    @nn.compact
    def __call__(self, x, augment=True):
        return nn.Dense(1)(x)


class ForgottenDropout(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(1)(nn.Dropout(0.5, deterministic=False)(x))


class NoMask(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        return nn.Dense(1)(norm(x, not train))


def test_an_argument_that_nobody_gives_is_named():
    with pytest.raises(UserError, match=r"NeedsMore\.__call__ needs temperature"):
        oj.flax_problem(NeedsMore(), X, Y, squared)
    with pytest.warns(UserWarning, match="flag augment that is not known: it stays True"):
        oj.flax_problem(OddFlag(), X, Y, squared)


def test_a_dropout_that_is_on_in_evaluation_is_refused():
    problem = oj.flax_problem(ForgottenDropout(), X, Y, squared)
    with pytest.raises(UserError, match="dropout is on in evaluation"):
        oj.make_run(problem, optax.sgd, 2)({"learning_rate": 0.01}, KEY)


def test_batch_statistics_without_a_mask_get_programs_of_their_own():
    run = oj.make_run(oj.flax_problem(NoMask(), X, Y, squared), optax.sgd, 4, max_batch_size=4)
    grid = {"learning_rate": [0.01], "batch_size": [2, 4]}
    found, static = (oj.sweep(run, grid, batching=b, **quiet) for b in ("auto", "static"))
    assert np.array_equal(found.final_loss, static.final_loss)
    for refused in (
        lambda: oj.sweep(run, grid, batching="masked", **quiet),
        lambda: run({"learning_rate": 0.01, "batch_size": 2}, KEY),
    ):
        with pytest.raises(UserError, match="take `mask`"):
            refused()
