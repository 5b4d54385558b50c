"""Biased, estimated and implicit gradients against what they should be; memory; refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from oracles import central_difference

import optjax as oj
from optjax.hypergradients import (
    ES,
    PES,
    Forward,
    Implicit,
    NonFiniteHypergradient,
    Recursive,
    Reverse,
    Segmented,
    Truncated,
    footprint,
)
from optjax.run.problems import Data, Problem
from optjax.theory import gradient_descent

KEY = jax.random.key(2)


def _data(n, d, seed):
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(n, d)) * np.geomspace(0.3, 2, d)
    return X, rng.normal(size=n), rng.normal(size=d)


# ------------------------------------------------------------------------------------ truncated


@pytest.mark.parametrize("k", [1, 5, 20])
def test_truncated_is_k_over_t_of_the_gradient(k):
    """Gradient descent at one rate on a quadratic: T equal factors, k of them differentiated."""
    X, t, w0 = _data(5, 4, 0)
    run = oj.make_run(oj.least_squares(X, t, w0), optax.sgd, 20, sampler="full")
    value, gradient = oj.hypergrad(run, mode=Truncated(k))({"learning_rate": 0.1}, KEY)
    exact = gradient_descent.gradient_descent_hypergradient(X, t, w0, 0.1, 20)
    np.testing.assert_allclose(
        value, gradient_descent.gradient_descent_loss(X, t, w0, 0.1, 20), rtol=1e-12
    )
    np.testing.assert_allclose(gradient["learning_rate"], exact * k / 20, rtol=1e-10)


def test_truncated_under_momentum_is_the_derivative_with_the_first_rates_fixed():
    X, t, w0 = _data(5, 4, 1)
    run = oj.make_run(oj.least_squares(X, t, w0), optax.sgd, 12, max_batch_size=3)
    last = Truncated(4)
    for of in ("final_loss", "mean_loss", lambda trajectory: jnp.sum(trajectory.loss[-3:])):
        _, gradient = oj.hypergrad(run, objective=of, wrt="learning_rate", mode=last)(
            {"learning_rate": 0.05, "momentum": 0.5}, KEY
        )
        schedule = oj.Piecewise(np.full(12, 0.05))
        _, each = oj.hypergrad(run, objective=of, wrt="learning_rate", mode="reverse")(
            {"learning_rate": schedule, "momentum": 0.5}, KEY
        )
        expected = each["learning_rate"].values[-4:].sum()
        np.testing.assert_allclose(gradient["learning_rate"], expected, rtol=1e-10)


def test_truncated_to_the_whole_run_is_the_gradient_from_its_start_on():
    X, t, w0 = _data(5, 4, 1)
    run = oj.make_run(oj.least_squares(X, t), optax.adagrad, 6, sampler="full")
    hparams = {"learning_rate": 0.1, "initial_params": w0, "initial_accumulator_value": 0.2}
    all_of_it = oj.hypergrad(run, mode=Truncated(6))(hparams, KEY).gradient
    for a, b in zip(
        jax.tree.leaves(all_of_it),
        jax.tree.leaves(oj.hypergrad(run, mode="reverse")(hparams, KEY).gradient),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=1e-12)
    with pytest.raises(oj.UserError, match="initial_params"):
        oj.hypergrad(run, wrt="initial_params", mode=Truncated(3))(hparams, KEY)


# ------------------------------------------------------------------------ evolution strategies


def _z(gradient, error, exact):
    return float((gradient - exact) / error)


def test_es_is_unbiased_on_a_quadratic():
    """The loss after one step is a parabola in the rate (lopsided: far from its vertex)."""
    X, t, w0 = _data(5, 4, 2)
    run = oj.make_run(oj.least_squares(X, t, w0), optax.sgd, 1, sampler="full")
    found = oj.hypergrad(run, mode=ES(pairs=4000, sigma={"learning_rate": 0.3}, at_once=4000))(
        {"learning_rate": 0.9}, KEY
    )
    exact = gradient_descent.one_step_hypergradient(X, t, w0, 0.9)
    z = _z(found.gradient["learning_rate"], found.aux["standard_error"]["learning_rate"], exact)
    assert abs(z) < 3.5
    assert found.aux["standard_error"]["learning_rate"] < 0.1 * abs(exact)
    np.testing.assert_allclose(
        found.value, gradient_descent.one_step_loss(X, t, w0, 0.9), rtol=1e-12
    )


def test_es_is_unbiased_by_many_numbers():
    """By the initial parameters the final loss is a quadratic, whatever the number of steps."""
    X, t, w0 = _data(6, 4, 3)
    run = oj.make_run(oj.least_squares(X, t), optax.sgd, 6, max_batch_size=2)
    hparams = {"learning_rate": 0.05, "initial_params": w0}
    exact = oj.hypergrad(run, wrt="initial_params")(hparams, KEY).gradient["initial_params"]
    found = oj.hypergrad(run, wrt="initial_params", mode=ES(pairs=4000, at_once=4000))(hparams, KEY)
    z = (found.gradient["initial_params"] - exact) / found.aux["standard_error"]["initial_params"]
    assert np.max(np.abs(z)) < 3.5


def _linear_in_theta():
    """W ← w − η(w − θ), loss ½(w − θ)²: the state is linear in the θ of every step."""

    def loss(w, state, batch, hparams):
        return 0.5 * jnp.sum((w - hparams["theta"]) ** 2), state

    def objective(w, state, data, hparams):
        return 0.5 * jnp.sum((w + 1.0) ** 2)

    def init(key, data):
        return data.shared, ()

    return Problem(init, loss, objective, Data((), jnp.array([0.3, -2.0])),
                   hparams=frozenset({"theta"}))  # fmt: skip


@pytest.mark.parametrize("of", ["final_loss", "mean_loss", lambda run: run.params[0] ** 2])
@pytest.mark.parametrize("segment", [3, 12])
def test_pes_is_unbiased_on_a_quadratic(of, segment):
    """A quadratic in all segments' perturbations together; θ = 0.7 is far from any minimum."""
    run = oj.make_run(_linear_in_theta(), optax.sgd, 12, record_every=3)
    hparams = {"learning_rate": 0.2, "theta": 0.7}
    exact = oj.hypergrad(run, objective=of, wrt="theta", mode="forward")(hparams, KEY)
    mode = PES(segment, pairs=60_000, sigma={"theta": 0.5})
    found = oj.hypergrad(run, objective=of, wrt="theta", mode=mode)(hparams, KEY)
    error = found.aux["standard_error"]["theta"]
    assert abs(_z(found.gradient["theta"], error, exact.gradient["theta"])) < 3.5
    assert error < 0.04 * abs(exact.gradient["theta"])  # a bias of a seventh would show
    np.testing.assert_allclose(found.value, exact.value, rtol=1e-12)


def test_pes_smooths_each_segment_by_itself():
    """One step a segment: each factor (1 − ηh)² is smoothed by itself, E = (1 − ηh)² + σ²h²."""
    h, rate, sigma, steps = 1.7, 0.4, 0.15, 3
    run = oj.make_run(oj.quadratic([h], [1.0]), optax.sgd, steps)
    mode = PES(1, pairs=20000, sigma={"learning_rate": sigma})
    found = oj.hypergrad(run, mode=mode)({"learning_rate": rate}, KEY)

    def smoothed(rate):
        return h / 2 * ((1 - rate * h) ** 2 + (sigma * h) ** 2) ** steps

    exact = central_difference(smoothed, rate, 1e-6)
    z = _z(found.gradient["learning_rate"], found.aux["standard_error"]["learning_rate"], exact)
    assert abs(z) < 3.5


def test_es_by_a_batch_size_is_the_slope_of_the_smoothed_losses():
    """E ε F(round(b + σε))/σ over the normal's weight between half-integers, in closed form."""
    X, t, w0 = _data(16, 3, 4)
    run = oj.make_run(oj.least_squares(X, t, w0), optax.sgd, 6)
    b, sigma = 6, 2.0
    losses = jax.vmap(
        lambda b: run({"learning_rate": 0.02, "batch_size": b}, KEY).final_loss
    )(jnp.arange(1, 17))  # fmt: skip
    ends = np.array([-np.inf, *np.arange(1.5, 16), np.inf])
    density = np.exp(-(((ends - b) / sigma) ** 2) / 2) / np.sqrt(2 * np.pi)
    exact = np.sum(losses * (density[:-1] - density[1:])) / sigma
    mode = ES(pairs=4000, sigma={"batch_size": sigma}, at_once=500)
    found = oj.hypergrad(run, wrt="batch_size", mode=mode)(
        {"learning_rate": 0.02, "batch_size": b}, KEY
    )
    z = _z(found.gradient["batch_size"], found.aux["standard_error"]["batch_size"], exact)
    assert abs(z) < 3.5


# ------------------------------------------------------------------------------------ implicit


@pytest.mark.parametrize("penalty", [1e-8, 1e-5, 1e-2, 1.0])
def test_implicit_is_the_ridge_derivative_down_to_the_singular_limit(penalty):
    """dw/dλ = −Xᵀ(XXᵀ + λI)⁻²t for ‖Xw − t‖² + λ‖w‖², 4 examples and 7 parameters."""
    X, t, _ = _data(4, 7, 5)
    run = oj.make_run(oj.least_squares(X, t, scale=4), optax.sgd, 6000, sampler="full")
    rate = 0.9 / np.linalg.norm(X, 2) ** 2 / 2
    hparams = {"learning_rate": rate, "l2": penalty}
    inverse = np.linalg.inv(X @ X.T + penalty * np.eye(4))
    expected = -X.T @ inverse @ inverse @ t
    v = np.random.default_rng(0).normal(size=7)  # has parts off the row space

    def of(trajectory):
        return jnp.dot(v, trajectory.params)

    found = oj.hypergrad(run, objective=of, wrt="l2", mode="implicit")(hparams, KEY)
    np.testing.assert_allclose(found.gradient["l2"], v @ expected, rtol=1e-7)
    assert found.aux["residual"] < 1e-10


def test_implicit_at_zero_penalty_is_the_limit():
    X, t, _ = _data(4, 7, 6)
    run = oj.make_run(oj.least_squares(X, t, scale=4), optax.sgd, 6000, sampler="full")
    rate = 0.9 / np.linalg.norm(X, 2) ** 2 / 2
    inverse = np.linalg.inv(X @ X.T)
    expected = -X.T @ inverse @ inverse @ t

    def of(trajectory):
        return jnp.sum(trajectory.params**3)

    found = oj.hypergrad(run, objective=of, wrt="l2", mode="implicit")(
        {"learning_rate": rate, "l2": 0.0}, KEY
    )
    w = X.T @ inverse @ t
    np.testing.assert_allclose(found.gradient["l2"], 3 * w**2 @ expected, rtol=1e-7)


@pytest.mark.parametrize("solver", ["cg", "normal_cg", "neumann"])
@pytest.mark.parametrize("direction", ["tangent", "adjoint"])
def test_implicit_by_data_weights_agrees_with_reverse_and_differences(solver, direction):
    """More examples than parameters: the solution moves with the weights."""
    X, t, _ = _data(9, 3, 7)
    X = X / np.geomspace(0.3, 2, 3)  # well conditioned: reverse mode must converge, too
    V, y, _ = _data(5, 3, 8)
    run = oj.make_run(oj.least_squares(X, t), optax.sgd, 400, sampler="full")
    weights = np.random.default_rng(0).uniform(0.5, 2, size=9)

    def of(trajectory):
        return jnp.mean((V @ trajectory.params - y) ** 2)

    hparams = {"learning_rate": 0.2, "example_weights": weights, "l2": 0.05}
    wrt = ("example_weights", "l2")
    mode = Implicit(solver=solver, direction=direction)
    found = oj.hypergrad(run, objective=of, wrt=wrt, mode=mode)(hparams, KEY).gradient
    through = oj.hypergrad(run, objective=of, wrt=wrt, mode="segmented")(hparams, KEY).gradient
    for name in wrt:
        np.testing.assert_allclose(found[name], through[name], rtol=1e-6, atol=1e-10)


def test_implicit_before_convergence_reports_the_residual():
    X, t, w0 = _data(4, 7, 5)
    run = oj.make_run(oj.least_squares(X, t, w0), optax.sgd, 3, sampler="full")
    gradient = oj.hypergrad(run, wrt="l2", mode="implicit")
    hparams = {"learning_rate": 0.01, "l2": 0.1}
    with pytest.raises(oj.UserError, match=r"has not converged.*0\.\d+.*more steps"):
        gradient(hparams, KEY)
    marked = jax.jit(gradient)(hparams, KEY)
    assert not marked.finite
    assert np.isnan(marked.gradient["l2"])
    assert marked.aux["residual"] > 1e-3


def test_implicit_off_the_row_space_says_that_the_system_has_no_solution():
    """From w₀ off the row space, w at λ̃ = 0 has no derivative: any λ̃ > 0 removes that part."""
    X, t, w0 = _data(3, 6, 5)
    run = oj.make_run(oj.least_squares(X, t, w0), optax.sgd, 6000, sampler="full")
    rate = 0.9 * 3 / np.linalg.norm(X, 2) ** 2 / 2
    with pytest.raises(oj.UserError, match="linear system"):
        oj.hypergrad(run, wrt="l2", mode=Implicit(iterations=50))(
            {"learning_rate": rate, "l2": 0.0}, KEY
        )


def test_implicit_refuses_what_the_end_does_not_decide():
    X, t, _ = _data(9, 3, 7)
    run = oj.make_run(
        oj.least_squares(X, t), optax.sgd, 600, sampler="full", record_every=100, record_path=True
    )
    hparams = {"learning_rate": 0.1, "l2": 0.5}
    for of in (lambda run: run.loss[-2], lambda run: jnp.sum(run.path[-2] ** 2)):
        with pytest.raises(oj.UserError, match="before its end"):
            oj.hypergrad(run, objective=of, wrt="l2", mode="implicit")(hparams, KEY)
    last = oj.hypergrad(
        run, objective=lambda run: jnp.sum(run.path[-1] ** 2), wrt="l2", mode="implicit"
    )
    params = oj.hypergrad(run, objective=lambda run: jnp.sum(run.params**2), wrt="l2")
    np.testing.assert_allclose(
        last(hparams, KEY).gradient["l2"], params(hparams, KEY).gradient["l2"], rtol=1e-6
    )


def test_implicit_refuses_a_model_state_that_follows_the_parameters():
    def loss(w, state, batch, hparams):
        return jnp.sum((w - hparams["theta"]) ** 2), 0.9 * state + 0.1 * w

    problem = Problem(lambda key, data: (data.shared, data.shared), loss,
                      lambda w, state, data, hparams: jnp.sum(state**2),
                      Data((), jnp.array([0.3, -2.0])), hparams=frozenset({"theta"}))  # fmt: skip
    run = oj.make_run(problem, optax.sgd, 300)
    with pytest.raises(oj.UserError, match="model state"):
        oj.hypergrad(run, wrt="theta", mode="implicit")({"learning_rate": 0.2, "theta": 0.7}, KEY)


def test_implicit_with_no_slope_a_warm_start_and_many_numbers():
    """An example that is zero; a start at the solution; 20 weights of a singular problem."""
    X, t, _ = _data(18, 25, 5)
    X[3] = 0
    run = oj.make_run(oj.least_squares(X, t), optax.sgd, 8000, sampler="full")
    v = np.random.default_rng(0).normal(size=25)

    def of(trajectory):
        return jnp.dot(v, trajectory.params)

    rate = 0.9 * 18 / np.linalg.norm(X, 2) ** 2 / 2
    hparams = {"learning_rate": rate, "example_weights": np.ones(18), "l2": 0.0}
    many = oj.hypergrad(run, objective=of, wrt="example_weights", mode="implicit")(hparams, KEY)
    one = Implicit(direction="tangent")
    few = oj.hypergrad(run, objective=of, wrt="example_weights", mode=one)(hparams, KEY)
    np.testing.assert_allclose(
        many.gradient["example_weights"], few.gradient["example_weights"], atol=1e-10
    )
    warm = {"learning_rate": rate, "l2": 0.0, "initial_params": run(hparams, KEY).params}
    found = oj.hypergrad(run, objective=of, wrt="l2", mode="implicit")(warm, KEY)
    cold = oj.hypergrad(run, objective=of, wrt="l2", mode="implicit")(hparams, KEY)
    np.testing.assert_allclose(found.gradient["l2"], cold.gradient["l2"], rtol=1e-6)


# -------------------------------------------------------------------------------------- memory


def _temporaries(mode, steps):
    X, t, w0 = _data(8, 64, 9)
    run = oj.make_run(oj.least_squares(X, t, w0), optax.adam, steps, max_batch_size=2)
    gradient = oj.hypergrad(run, mode=mode)
    compiled = jax.jit(gradient).lower({"learning_rate": 0.1}, KEY).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.slow
def test_memory_grows_as_it_should():
    """Sixteen times the steps: forward the same, recursive by a level, segmented four times."""
    sizes = {
        mode.name: [_temporaries(mode, steps) for steps in (256, 4096)]
        for mode in (Forward(), Recursive(4), Segmented(), Reverse())
    }
    growth = {name: after / before for name, (before, after) in sizes.items()}
    assert growth["forward"] < 1.01
    assert growth["recursive"] < 1.75  # 6 levels for 4: 1.5, and what does not depend on them
    assert 2 < growth["segmented"] < 4.2
    assert growth["reverse"] > 10
    assert sizes["recursive"][1] < sizes["segmented"][1] < sizes["reverse"][1]


MODES_OF_MEMORY = [
    Forward(), Reverse(), Segmented(), Recursive(), Recursive(4), Truncated(64),
    ES(pairs=32, at_once=8), PES(64, pairs=32), Implicit(),
]  # fmt: skip


@pytest.mark.parametrize("optimizer", [pytest.param(optax.sgd, marks=pytest.mark.slow), optax.adam])
@pytest.mark.parametrize("mode", MODES_OF_MEMORY, ids=str)
def test_predicted_memory_is_what_is_compiled(mode, optimizer):
    """Within 1.75 times: the prediction counts arrays, XLA reuses some and copies others."""
    X, t, w0 = _data(8, 64, 9)
    run = oj.make_run(oj.least_squares(X, t, w0), optimizer, 1024, max_batch_size=2)
    wrt = "l2" if mode.name == "implicit" else "initial_params" if mode.name == "forward" else None
    hparams = {"learning_rate": 0.1, "l2": 0.1}
    hparams |= {"initial_params": w0} if wrt == "initial_params" else {}
    gradient = oj.hypergrad(run, wrt=wrt, mode=mode)
    theta, rest = gradient.parted(hparams)
    predicted = footprint.needed(mode, gradient.job, run.problem.data, theta, rest)
    compiled = jax.jit(gradient).lower(hparams, KEY).compile().memory_analysis()
    assert 1 / 1.75 < predicted / compiled.temp_size_in_bytes < 1.75


def test_reverse_that_does_not_fit_names_the_bytes_and_another_mode(monkeypatch):
    X, t, w0 = _data(8, 64, 9)
    run = oj.make_run(oj.least_squares(X, t, w0), optax.sgd, 5000, max_batch_size=2)
    monkeypatch.setattr(footprint, "available", lambda: 2.0**18)
    with pytest.raises(oj.UserError, match=r"needs about [\d.]+ MiB.*'segmented' would"):
        oj.hypergrad(run, mode="reverse")({"learning_rate": 0.1}, KEY)
    many = oj.hypergrad(run, wrt="example_weights")
    choice = many.explain({"learning_rate": 0.1, "example_weights": np.ones(8)})
    assert choice.mode.name in ("segmented", "forward")
    assert "8 numbers" in str(choice)


# ------------------------------------------------------------------- auto, divergence, refusals


def test_auto_chooses_and_says_why(capsys):
    X, t, w0 = _data(8, 6, 9)
    run = oj.make_run(oj.least_squares(X, t, w0), optax.sgd, 50)
    few = oj.hypergrad(run, explain=True)
    few({"learning_rate": 0.1}, KEY)
    few({"learning_rate": 0.2}, KEY)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert "forward" in said[0]
    many = oj.hypergrad(run, wrt="example_weights")
    weights = {"learning_rate": 0.1, "example_weights": np.ones(8)}
    assert many.explain(weights).mode.name == "reverse"
    one = oj.make_run(oj.least_squares(X, t, w0), optax.sgd, 1)
    assert oj.hypergrad(one).explain({"learning_rate": 0.1}).mode.name == "one_step"


def test_a_diverged_run_is_marked():
    X, t, w0 = _data(5, 4, 1)
    run = oj.make_run(oj.least_squares(X, t, w0), optax.sgd, 2000, sampler="full")
    gradient = oj.hypergrad(run)
    with pytest.warns(NonFiniteHypergradient, match=r"diverged at step \d+"):
        found = gradient({"learning_rate": 5.0}, KEY)
    assert oj.Status(int(found.status)) is oj.Status.DIVERGED
    assert not found.finite
    assert np.isnan(found.gradient["learning_rate"])
    rates = jnp.array([0.05, 5.0])
    many = jax.vmap(lambda r: gradient({"learning_rate": r}, KEY))(rates)
    assert many.finite.tolist() == [True, False]
    assert np.isfinite(many.gradient["learning_rate"][0])


def test_seeds_give_a_mean_and_its_standard_error():
    X, t, w0 = _data(6, 4, 1)
    run = oj.make_run(oj.least_squares(X, t, w0), optax.sgd, 8, max_batch_size=2)
    gradient = oj.hypergrad(run)
    hparams = {"learning_rate": 0.05, "l2": 0.1}
    found = gradient.over_seeds(hparams, 5)
    alone = [gradient(hparams, jax.random.key(s)) for s in range(5)]
    for name in hparams:
        slopes = np.array([one.gradient[name] for one in alone])
        np.testing.assert_allclose(found.gradient[name], slopes.mean(), rtol=1e-12)
        error = slopes.std(ddof=1) / np.sqrt(5)
        np.testing.assert_allclose(found.gradient_error[name], error, rtol=1e-10)
    np.testing.assert_allclose(found.value, np.mean([one.value for one in alone]), rtol=1e-12)


def test_jit_vmap_and_a_second_derivative():
    X, t, w0 = _data(6, 4, 1)
    run = oj.make_run(oj.least_squares(X, t, w0), optax.sgd, 8, sampler="full")
    gradient = oj.hypergrad(run, mode="forward")

    def slope(rate):
        return gradient({"learning_rate": rate}, KEY).gradient["learning_rate"]

    curvature = jax.jit(jax.vmap(jax.grad(slope)))(jnp.array([0.05, 0.1]))
    numeric = [central_difference(slope, r, 1e-6) for r in (0.05, 0.1)]
    np.testing.assert_allclose(curvature, numeric, rtol=1e-6)


def test_no_second_program_for_other_values():
    X, t, w0 = _data(6, 4, 1)
    run = oj.make_run(oj.least_squares(X, t, w0), optax.sgd, 8)
    gradient = oj.hypergrad(run, mode="segmented")
    gradient({"learning_rate": 0.05}, KEY)
    from optjax.hypergradients.hypergradient import _compute

    before = _compute._cache_size()
    gradient({"learning_rate": 0.07}, jax.random.key(9))
    oj.hypergrad(run, mode="segmented")({"learning_rate": 0.01}, KEY)
    assert _compute._cache_size() == before


@pytest.mark.parametrize(
    ("make", "hparams", "match"),
    [
        (lambda r: oj.hypergrad(r, wrt="batch_size"), {"batch_size": 2}, "mode='es'"),
        (lambda r: oj.hypergrad(r, wrt="l3"), {}, "hparams lack"),
        (lambda r: oj.hypergrad(r, mode="backward"), {}, "unknown mode"),
        (lambda r: oj.hypergrad(r, mode="truncated"), {}, r"Truncated\(k\)"),
        (lambda r: oj.hypergrad(r, mode=Truncated(99)), {}, "expected 1 to"),
        (lambda r: oj.hypergrad(r, mode="one_step"), {}, "expected a run of one"),
        (lambda r: oj.hypergrad(r, objective="loss"), {}, "unknown objective"),
        (lambda r: oj.hypergrad(r, objective=lambda run: run.params), {}, "one real number"),
        (lambda r: oj.hypergrad(r, wrt="learning_rate", mode="implicit"), {}, "has no part"),
        (lambda r: oj.hypergrad(r, mode=ES(pairs=1)), {}, "at least 2"),
        (lambda r: oj.hypergrad(r, mode=PES(3)), {}, "divisor"),
        (lambda r: oj.hypergrad(r, mode=ES(sigma={"rate": 0.1})), {}, "sigma names"),
        (lambda r: oj.hypergrad(r), {"learning_rate": oj.Piecewise(np.ones(3))}, "3 values"),
        (lambda r: oj.hypergrad(r), {"example_weights": np.ones(4)}, "expected \\(6,\\)"),
        (lambda r: oj.hypergrad(r), {"l2": np.ones(3)}, r"shape \(3,\).*like the"),
        (lambda r: oj.hypergrad(r), {"initial_params": np.ones(3)}, "initial_params"),
        (lambda r: oj.hypergrad(r), {"l2": True}, "expected a number"),
        (lambda r: oj.hypergrad(optax.sgd), {}, "oj.make_run"),
        (lambda r: oj.hypergrad(r), {"l2": {"w": np.ones(4)}}, "like the parameters"),
        (lambda r: oj.hypergrad(r), {"l2": np.ones(1)}, "like the parameters"),
        (lambda r: oj.hypergrad(r, mode=Segmented(0)), {}, "at least 1"),
        (lambda r: oj.hypergrad(r, mode=Segmented(2.5)), {}, "at least 1"),
        (lambda r: oj.hypergrad(r, mode=Recursive(1)), {}, "at least 2"),
        (lambda r: oj.hypergrad(r, mode=Forward(at_once=0)), {}, "at least 1"),
        (lambda r: oj.hypergrad(r, mode=ES), {}, "expected a name, or an object"),
        (lambda r: oj.hypergrad(r, mode=3), {}, "expected a name, or an object"),
        (lambda r: oj.hypergrad(r, mode=ES(sigma="a")), {}, "above 0"),
        (lambda r: oj.hypergrad(r, wrt=5), {}, "expected a name, or several"),
        (lambda r: oj.hypergrad(r, mode=Implicit(direction="up")), {"l2": 1.0}, "direction"),
        (lambda r: lambda h, k: oj.hypergrad(r)(h, "0"), {}, "key is '0'"),
        (lambda r: lambda h, k: oj.hypergrad(r)(None, k), {}, "expected a dict"),
        (lambda r: lambda h, k: oj.hypergrad(r).over_seeds(h, "ab"), {}, "whole number"),
        (lambda r: lambda h, k: oj.hypergrad(r).over_seeds(h, 1), {}, "at least two"),
    ],
)
def test_bad_input_is_one_line(make, hparams, match):
    X, t, w0 = _data(6, 4, 1)
    run = oj.make_run(oj.least_squares(X, t, w0), optax.sgd, 8)
    with pytest.raises(oj.UserError, match=match) as raised:
        make(run)({"learning_rate": 0.05, **hparams}, KEY)
    assert "\n" not in str(raised.value)
