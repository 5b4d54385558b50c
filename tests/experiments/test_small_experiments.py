"""The six small experiments with small configs: claims, verdicts, figures, refusals."""

import contextlib
from unittest import mock

import jax
import numpy as np
import pytest

from optjax.experiments import accounting, minimum_norm, one_step, padding, rmsprop_counterexample
from optjax.experiments.weight_decay import claims
from optjax.experiments.weight_decay import run as weight_decay
from optjax.support.errors import UserError


def _first(module, table, count):
    """With the first few of a module's table: each of the others costs its compilations."""
    whole = getattr(module, table)
    kept = list(whole.items() if isinstance(whole, dict) else whole)[:count]
    return mock.patch.object(module, table, type(whole)(kept))


# Without what costs most: the fields by gradients are those of tests/convnets/test_receptive.py.
LESS = {
    "accounting": lambda: mock.patch.object(
        accounting, "measured_field", lambda model, shape, *_, **__: np.ones(shape[:2], bool)
    ),
    "minimum_norm": lambda: _first(minimum_norm, "SAMPLERS", 1),
    "one_step": lambda: _first(one_step, "SAMPLERS", 1),
    "rmsprop_counterexample": lambda: _first(rmsprop_counterexample, "OPTIMISERS", 2),
}

SMALL = {
    "minimum_norm": (
        minimum_norm,
        minimum_norm.Config(rows=(4,), columns=(9,), seeds=3, steps=800),
        {"min-norm/sgd": "holds", "min-norm/start-off-row-space": "holds"},
    ),
    "rmsprop_counterexample": (
        rmsprop_counterexample,
        rmsprop_counterexample.Config(problems=6, steps=6000, recursions=20),
        {"rmsprop/hand-iterates": "corrected", "rmsprop/not-min-norm": "holds"},
    ),
    "one_step": (
        one_step,
        one_step.Config(problems=8, seeds=200),
        {
            "one-step/loss": "holds",
            "one-step/hypergradient": "holds",
            "one-step/optimal-learning-rate": "holds",
            "one-step/mini-batch-learning-rate": "holds",
        },
    ),
    "weight_decay": (
        weight_decay,
        weight_decay.Config(
            problems=6, sgd_steps=20, adaptive_steps=2000, hyper_steps=20, spreads=(1, 10, 100)
        ),
        {"weight-decay/equivalence": "holds", "weight-decay/adaptive-differs": "holds"},
    ),
    "accounting": (
        accounting,
        accounting.Config(points=1, sides=(16, 32), widths=(4, 8)),
        {
            **{f"accounting/{claim}": "holds" for claim in accounting.SOURCE},
            "colourisation/why-more-parameters": "refuted",
        },
    ),
    "padding": (
        padding,
        padding.Config(),
        {"padding/kernel-4": "holds", "padding/kernel-5": "holds"},
    ),
}


def _run(name):
    """In float64, whatever the process is set to."""
    module, config, _ = SMALL[name]
    jax.config.update("jax_enable_x64", False)
    try:
        dataset = module.run(config)
        assert not jax.config.jax_enable_x64
        return dataset
    finally:
        jax.config.update("jax_enable_x64", True)


@pytest.fixture(scope="module")
def datasets():
    done = {}

    def get(name):
        if name not in done:
            with LESS.get(name, contextlib.nullcontext)():
                done[name] = _run(name)
        return done[name]

    return get


@pytest.mark.parametrize("name", SMALL)
def test_claims_come_out_and_figures_draw(name, datasets, presented):
    module, _, expected = SMALL[name]
    with LESS.get(name, contextlib.nullcontext)():
        assert presented(module, name, datasets(name)) == expected


@pytest.mark.slow
@pytest.mark.parametrize("name", LESS)
def test_they_do_with_all_that_was_left_out(name, presented):
    module, _, expected = SMALL[name]
    assert presented(module, name, _run(name)) == expected


def test_sgd_of_the_hand_example_ends_at_the_minimum_norm_solution(datasets):
    dataset = datasets("rmsprop_counterexample")
    np.testing.assert_allclose(dataset.path_sgd[-1], dataset.minimum_norm, rtol=1e-12)


def test_the_hand_iterates_are_those_worked_out_exactly(datasets):
    measured = rmsprop_counterexample.claims(datasets("rmsprop_counterexample"))[0].measured
    assert measured["figures that differ from the source's"] == ["w2[0]"]
    exact = {
        "g1": (-4, -2),
        "v1": (1.6, 0.4),
        "w1": (0.313747, 0.311306),
        "g2": (-2.122399, -1.061200),
        "v2": (1.890458, 0.472614),
        "w2": (0.466996, 0.463456),
        "w2 with ε inside the root": (0.468753, 0.464657),
    }
    for name, values in exact.items():
        np.testing.assert_allclose(measured[name], values, atol=1.1e-6)


def test_verdicts_follow_the_measurements(datasets):
    dataset = datasets("rmsprop_counterexample").copy(deep=True)
    dataset["path"][2, 0] = 0.469
    assert rmsprop_counterexample.claims(dataset)[0].verdict == "holds"
    dataset["path"][1:3] = 0.9
    assert rmsprop_counterexample.claims(dataset)[0].verdict == "refuted"

    dataset = datasets("minimum_norm").copy(deep=True)
    dataset["final_distance"][:] = 1e-3
    assert {c.verdict for c in minimum_norm.claims(dataset)} == {"refuted"}

    dataset = datasets("one_step").copy(deep=True)
    dataset["slope"].loc[{"mode": "forward"}] *= 1 + 1e-9
    dataset["batch_best"].loc[{"part": "closed form"}] *= 1.5
    with LESS["one_step"]():
        verdicts = [c.verdict for c in one_step.claims(dataset)]
    assert verdicts == ["holds", "refuted", "holds", "refuted"]

    dataset = datasets("weight_decay").copy(deep=True)
    dataset["sgd_l2"] += 1e-3
    dataset["distance"][:] = dataset["distance"].values[:, ::-1]
    assert [c.verdict for c in weight_decay.claims(dataset)] == ["refuted", "corrected"]
    for name in ("slope_by_decay", "slope_by_rate"):
        dataset = datasets("weight_decay").copy(deep=True)
        dataset[name][1, 2, 0, 0] = 1e-8
        assert [c.verdict for c in weight_decay.claims(dataset)] == ["refuted", "holds"]

    dataset = datasets("padding").copy(deep=True)
    dataset["jax_up"][:] = 0
    assert {c.verdict for c in padding.claims(dataset)} == {"refuted"}


def test_rank_correlation_is_scipys():
    from scipy.stats import spearmanr

    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 5, 40), rng.normal(size=40)
    assert claims._spearman(x, y) == pytest.approx(spearmanr(x, y).statistic)


def test_padding_refuses_a_stride_that_does_not_divide():
    with pytest.raises(UserError, match="stride 3 does not divide size 32"):
        padding.run(padding.Config(stride=3))
