"""At convergence: the derivative of the solution by the implicit function theorem.

    G(w, θ) = ∇_w [L(w, θ) + λ̃‖w‖²] = 0,   H dw/dθ = −∂_θ G,   dF/dθ = ∂_w F · dw/dθ + ∂_θ F

The run's length and optimiser do not matter: no step is differentiated. With more parameters than
examples H is singular where λ̃ = 0. A run from 0 then ends at the solution of minimum norm, and
its derivative is H⁺ in place of H⁻¹: ∂_θ G lies in the range of H, and conjugate gradients from 0
never leave it, at λ̃ = 0 as at any λ̃ above it. For ‖Xw − t‖² + λ‖w‖² that is

    dw/dλ = −Xᵀ(XXᵀ + λI)⁻² t,   down to λ → 0.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, cast, get_args

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jax.scipy.sparse.linalg import cg

from optjax.hypergradients.job import Job, looks_inside
from optjax.hypergradients.mode import Footprint, Found, Mode
from optjax.run import core
from optjax.run.batching import Batch
from optjax.run.core import Outcome, Trajectory
from optjax.run.problems import Data
from optjax.support.errors import UserError, whole
from optjax.support.types import Array, HParams, Key, PyTree

Solver = Literal["cg", "normal_cg", "neumann"]


@dataclasses.dataclass(frozen=True)
class Implicit(Mode):
    """Implicit differentiation at the run's end (Bengio 2000; Lorraine et al. 2020).

    It serves hyperparameters of what is minimised: ``l2``, ``example_weights``, the problem's own.
    The result's ``aux`` holds ``residual``, ‖G‖ at the end over ‖G‖ at the start, and
    ``solve_residual``, that of the linear system.

    Args:
      solver: "cg"; "normal_cg", on H² u = H b, for the adjoint of a singular H; or "neumann",
        Σ_{i<iterations} α (I − αH)ⁱ b, as Lorraine et al.
      iterations: of the solver; by default until the tolerance, at most ten times the parameters
        (Neumann: 1,000).
      direction: "tangent" solves a system for each number of θ; "adjoint" solves one, whose right
        side ∂_w F may have parts outside the range of a singular H ("cg" is then followed by
        "normal_cg"); "auto": tangents for up to 16.
      tolerance: the largest ``residual`` that counts as converged; √ε of the parameters' type by
        default. A run whose status is CONVERGED by its own tolerance counts, too.
    """

    solver: Solver = "cg"
    iterations: int | None = None
    direction: Literal["auto", "tangent", "adjoint"] = "auto"
    tolerance: float | None = None

    name = "implicit"
    never_finite = (
        "mode 'implicit': at no point {tried} have the runs converged; take more steps, a larger "
        "tolerance, or mode 'segmented'"
    )

    def check(self, job: Job, names: frozenset[str]) -> None:
        """Check that the loss depends on the hyperparameters, and the objective on the end."""
        if self.solver not in get_args(Solver):
            raise UserError(f"solver is {self.solver!r}: expected {', '.join(get_args(Solver))}")
        if self.direction not in ("auto", "tangent", "adjoint"):
            raise UserError(
                f"direction is {self.direction!r}: expected 'auto', 'tangent' or 'adjoint'"
            )
        if self.iterations is not None:
            whole("Implicit: iterations", self.iterations, 1)
        if job.averages:
            raise UserError(
                "mode 'implicit' and objective 'mean_loss': expected a number of the run's end"
            )
        for name in sorted(names):
            if name in job.plan.own or name in ("initial_params", "batch_size"):
                hint = "give the penalty as l2" if name == "weight_decay" else "leave it out of wrt"
                raise UserError(
                    f"mode 'implicit' and {name!r}: the solution is that of the training loss, in "
                    f"which it has no part; {hint}, or take mode 'segmented'"
                )

    def bytes(self, job: Job, found: Footprint, numbers: int) -> int:
        """Count the vectors of the linear solver."""
        return 8 * found.params + found.step

    def cost(self, job: Job, found: Footprint, numbers: int) -> float:
        """Count a run; leave out the linear system."""
        return 1.0

    def __call__(self, job: Job, data: Data, theta: HParams, rest: HParams, key: Key) -> Found:
        hparams = {**rest, **theta}
        trajectory = core.run(job.plan, data, hparams, key)
        w, unravel = ravel_pytree(trajectory.params)
        flat, theta_of = ravel_pytree(theta)
        start, _ = ravel_pytree(core.init(job.plan, data, hparams, key).params)

        def gradient(w: Array, flat: Array) -> Array:
            """G(w, θ)."""
            at = {**rest, **theta_of(flat)}
            return jax.grad(
                lambda w: _minimised(job, data, at, unravel(w), trajectory.model_state, key)
            )(w)

        def value(w: Array, flat: Array) -> Array:
            at = {**rest, **theta_of(flat)}
            return job.judge(_at_end(job, data, at, trajectory, unravel(w)))[0]

        def hessian(v: Array) -> Array:
            return jax.jvp(lambda w: gradient(w, flat), (w,), (v,))[1]

        number, (by_w, by_theta) = jax.value_and_grad(value, argnums=(0, 1))(w, flat)
        if self.direction == "tangent" or (self.direction == "auto" and flat.size <= 16):
            # −∂_θ G, a row for each number: (P, d)
            rows = -jax.vmap(lambda e: jax.jvp(lambda f: gradient(w, f), (flat,), (e,))[1])(
                jnp.eye(flat.size, dtype=flat.dtype)
            )
            moves, errors = jax.vmap(lambda b: self._solve(hessian, b))(rows)
            slope, error = by_theta + moves @ by_w, jnp.max(errors)
        else:
            v, error = self._adjoint(hessian, by_w)
            back = jax.vjp(lambda f: gradient(w, f), flat)[1](v)[0]
            slope = by_theta - back
        # A warm start has no gradient to compare with: ‖Hw‖ is the size of what cancels in G.
        scale = jnp.maximum(_norm(gradient(start, flat)), _norm(hessian(w)))
        residual = _norm(gradient(w, flat)) / scale
        outcome = Outcome(trajectory.final_loss, trajectory.status, trajectory.diverged_at)
        elsewhere = _seen_along_the_run(job, data, hparams, trajectory)
        aux = {"residual": residual, "solve_residual": error, "elsewhere": elsewhere}
        limit = self._tolerance(w.dtype)
        good = (residual <= limit) | (trajectory.status == core.Status.CONVERGED)
        good &= (error <= limit**0.5) & (elsewhere == 0)
        slope = jnp.where(good, slope, jnp.nan)
        return Found(number, theta_of(slope), outcome, aux)

    def _tolerance(self, dtype: Any) -> float:
        return float(jnp.finfo(dtype).eps) ** 0.5 if self.tolerance is None else self.tolerance

    def _adjoint(self, hessian: Callable[[Array], Array], b: Array) -> tuple[Array, Array]:
        """H⁻¹b; where plain conjugate gradients fail, b is not in H's range: least squares."""
        v, error = self._solve(hessian, b)
        if self.solver != "cg":
            return v, error
        again = dataclasses.replace(self, solver="normal_cg")
        limit = self._tolerance(b.dtype) ** 0.5
        return jax.lax.cond(error <= limit, lambda: (v, error), lambda: again._solve(hessian, b))

    def _solve(self, hessian: Callable[[Array], Array], b: Array) -> tuple[Array, Array]:
        """X of Hx = b, and ‖Hx − b‖/‖b‖ (of the normal equations: ‖H(Hx − b)‖/‖Hb‖)."""
        tol = float(jnp.finfo(b.dtype).eps) ** 0.75
        most = self.iterations
        # jax's solver mixes its own float64 constants into the arithmetic.
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            if self.solver == "cg":
                x, _ = cg(hessian, b, tol=tol, maxiter=most)
                return x, _relative(hessian(x) - b, b)
            if self.solver == "normal_cg":
                right = hessian(b)
                x, _ = cg(lambda v: hessian(hessian(v)), right, tol=tol, maxiter=most)
                return x, _relative(hessian(hessian(x) - b), right)
            x = _neumann(hessian, b, most or 1000)
            return x, _relative(hessian(x) - b, b)

    def refusal(self, aux: dict[str, Any], status: int, dtype: Any) -> str | None:
        """As `Mode.refusal`: the run or the linear system has not converged."""
        if status == core.Status.DIVERGED:
            return None
        residual, solve = float(aux["residual"]), float(aux["solve_residual"])
        limit = self._tolerance(dtype)
        if float(aux["elsewhere"]) > 0:
            return (
                "mode 'implicit': the objective depends on the run before its end, or on a model "
                "state (running averages) that follows the parameters, which the solution does not "
                "tell; take mode 'segmented'"
            )
        if not residual <= limit and status != core.Status.CONVERGED:
            return (
                f"mode 'implicit': the run has not converged, its gradient is {residual:.2g} of "
                f"what it was at the start (expected at most {limit:.2g}); take more steps, a "
                "larger tolerance, or mode 'segmented'"
            )
        if not solve <= limit**0.5:
            return (
                f"mode 'implicit': the linear system is solved to {solve:.2g} only (expected "
                f"{limit**0.5:.2g}); take more iterations, or Implicit(solver='normal_cg') where "
                "the Hessian is singular"
            )
        return None


def _norm(v: Array) -> Array:
    """‖v‖, above 0."""
    return jnp.maximum(jnp.linalg.norm(v), jnp.finfo(v.dtype).tiny)


def _relative(rest: Array, b: Array) -> Array:
    """‖rest‖/‖b‖, and 0 where b is 0."""
    return jnp.where(jnp.any(b != 0), jnp.linalg.norm(rest) / _norm(b), 0)


def _seen_along_the_run(job: Job, data: Data, hparams: HParams, trajectory: Trajectory) -> Array:
    """Measure the objective's derivative by all that the final parameters do not decide."""
    metrics = {name: rows[:-1] for name, rows in trajectory.metrics.items()}
    path = None
    if trajectory.path is not None:
        path = jax.tree.map(lambda rows: rows[:-1], trajectory.path)
    held = (trajectory.loss, metrics, path, trajectory.model_state)
    leaves, structure = jax.tree.flatten(held)
    moves = [jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in leaves]

    def value(floating: list[Array]) -> Array:
        given = iter(floating)
        merged = [next(given) if f else v for f, v in zip(moves, leaves, strict=True)]
        loss, metrics, path, state = jax.tree.unflatten(structure, merged)
        seen = trajectory._replace(loss=loss, model_state=state)
        seen = seen._replace(
            metrics={n: jnp.append(v, trajectory.metrics[n][-1:]) for n, v in metrics.items()}
        )
        if path is not None:
            last = jax.tree.map(
                lambda rows, w: jnp.concatenate([rows, w[None]]), path, trajectory.params
            )
            seen = seen._replace(path=last)
        return job.judge(_at_end(job, data, hparams, seen, trajectory.params))[0]

    slopes = jax.grad(value)([leaf for f, leaf in zip(moves, leaves, strict=True) if f])
    total = jnp.zeros((), trajectory.final_loss.dtype)
    for slope in slopes:
        total += jnp.sum(jnp.abs(slope)).astype(total.dtype)
    return total


def _minimised(
    job: Job, data: Data, hparams: HParams, params: PyTree, model_state: PyTree, key: Key
) -> Array:
    """L(w, θ) + λ̃‖w‖² over all training data, as a full-batch step sees it."""
    plan = job.plan
    last = jnp.asarray(plan.steps, jnp.int32)
    numbers = core.hparams_at(plan, hparams, params, last)
    batch = Batch(data.examples, None, key, data.shared, numbers.get("example_weights"))
    loss, _ = plan.loss(params, model_state, batch, numbers)
    return core.penalised(loss, numbers.get("l2"), params)


def _at_end(
    job: Job, data: Data, hparams: HParams, trajectory: Trajectory, params: PyTree
) -> Trajectory:
    """Return the trajectory with other final parameters."""
    plan, state = job.plan, trajectory.model_state
    numbers = core.hparams_at(plan, hparams, params, jnp.asarray(plan.steps, jnp.int32))
    metrics = plan.metrics(params, state, data, numbers)
    path = trajectory.path
    if path is not None and looks_inside(job):
        path = jax.tree.map(lambda rows, w: rows.at[-1].set(w), path, params)
    return trajectory._replace(
        params=params,
        path=path,
        final_loss=plan.objective(params, state, data, numbers),
        metrics={
            name: rows.at[-1].set(cast(Array, metrics[name]))
            for name, rows in trajectory.metrics.items()
        },
    )


def _neumann(hessian: Callable[[Array], Array], b: Array, terms: int) -> Array:
    """Σ_{i<terms} α (I − αH)ⁱ b, with α = 1/λ_max by power iteration."""

    def power(v: Array, _: None) -> tuple[Array, None]:
        v = hessian(v)
        return v / _norm(v), None

    v, _ = jax.lax.scan(power, b / _norm(b), None, length=30)
    rate = 1 / (1.05 * _norm(hessian(v)))

    def term(carry: tuple[Array, Array], _: None) -> tuple[tuple[Array, Array], None]:
        total, rest = carry
        return (total + rest, rest - rate * hessian(rest)), None

    (total, _), _ = jax.lax.scan(term, (jnp.zeros_like(b), b), None, length=terms)
    return rate * total
