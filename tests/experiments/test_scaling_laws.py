"""Scaling laws on trainings made up by a known law, on pictures a test can afford, and refusals."""

import numpy as np
import pytest
import xarray as xr
from matplotlib.figure import Figure

from optjax.experiments.scaling_laws import analysis, by_width, claims
from optjax.experiments.scaling_laws import run as scaling_laws
from optjax.experiments.scaling_laws.run import Config
from optjax.scaling import contradictions
from optjax.support.errors import UserError

N = np.array([1e3, 4e3, 1.6e4, 6.4e4])
STEPS = np.geomspace(16, 65536, 13)
ALPHA, BETA = 0.5, 0.3


def _law(size, examples):
    return 0.5 + 8 * size**-ALPHA + 6 * examples**-BETA


def _saved(grow=True, of_batch=0.1, noise=1e-3):
    """A dataset as `run` saves it, of curves that follow a law: N ∝ C^(β/(α+β)), C = 6ND.

    Args:
      grow: whether the size helps; otherwise the loss falls with the examples alone.
    """
    rng = np.random.default_rng(0)
    cost = 6 * N * 16
    steps_of = 1024 * cost[-1] / cost
    size = N if grow else np.full(4, 1e4)
    curves = _law(size[:, None], 16 * STEPS)[:, None, None, :] * np.exp(
        noise * rng.normal(size=(4, 2, 3, 1))
    )
    curves[:, 1] += 0.1  # the second rate is worse throughout
    curves = np.where(steps_of[:, None, None, None] < STEPS, np.nan, curves)
    own = curves[2, :, :, :5]
    batches = np.stack([own * 2**of_batch, own * 2**-of_batch])
    front = analysis.frontier(curves[:, 0], STEPS, N, cost, 7)
    fields, of = list(scaling_laws.FIELDS), list(scaling_laws.OF)
    by = {"net": ["conv-transpose"], "filters": [4, 8, 16, 32], "learning_rate": [0.01, 0.1]}
    return xr.Dataset(
        {
            "loss": (("net", "filters", "learning_rate", "seed", "step"), curves[None]),
            "parameters": (("net", "filters"), N[None]),
            "flops": (("net", "filters"), cost[None]),
            "batch_loss": (("batch_size", "learning_rate", "seed", "batch_step"), batches),
            "subset_loss": (
                ("subset_filters", "pictures", "learning_rate", "seed", "subset_step"),
                curves[:2, None, :, :, :8],
            ),
            "subset_law": (("power", "of"), np.full((2, 4), 0.1)),
            "budget": (("net", "budget_index"), front.budgets[None]),
            "budget_loss": (("net", "budget_index", "filters", "seed"), front.loss[None]),
            "best_N": (("net", "budget_index", "seed"), front.best[None]),
            "best_at_end": (("net", "budget_index", "seed"), front.at_end[None]),
            "foretold_N": (("net", "budget_index", "seed"), front.best[None]),
            "law": (("net", "field", "of"), np.full((1, 7, 4), 0.3)),
            "law_of_seed": (("net", "field", "seed"), np.full((1, 7, 3), 0.3)),
            "published": (("check", "kind"), [[c.printed, c.computed] for c in contradictions()]),
        },
        {
            **by, "step": STEPS, "batch_step": STEPS[:5], "batch_size": [8, 32], "field": fields,
            "of": of, "power": ["alpha_N", "alpha_D"], "check": [c.what for c in contradictions()],
        },
        {"middle": 16, "middle_steps": 256, "batch": 16, "data": "made up", "hoffmann_points": 0,
         "resamples": 10, "demo": 1},
    )  # fmt: skip


def test_the_best_size_grows_by_the_laws_power():
    # Widths close together: a parabola through three far apart is not the law's own curve.
    many = np.geomspace(1e3, 6.4e4, 13)
    cost = 96 * many
    curves = np.where(
        1024 * cost[-1] / cost[:, None] < STEPS, np.nan, _law(many[:, None], 16 * STEPS)
    )
    front = analysis.frontier(curves[:, None], STEPS, many, cost, 7)
    power = analysis.exponents(front.budgets, front.best)
    np.testing.assert_allclose(power, BETA / (ALPHA + BETA), atol=0.03)
    assert not front.at_end.any()
    D = np.geomspace(1e3, 1e6, 5)
    law = analysis.fitted(
        analysis.law_points(_law(N[:, None], 16 * STEPS), STEPS, N, 96 * N, 16), "hoffmann"
    )
    assert law is not None
    np.testing.assert_allclose([law.law.alpha, law.law.beta], [ALPHA, BETA], rtol=1e-4)
    best = analysis.foretold(law.law, 6 * D * 1e4, N, 96 * N, 16)
    # By Lagrange: αA N^−α = βB D^−β at 6ND = C.
    exact = ((ALPHA * 8) / (BETA * 6) * (D * 1e4) ** BETA) ** (1 / (ALPHA + BETA))
    np.testing.assert_allclose(best, np.clip(exact, N[0], N[-1]), rtol=0.02)


def test_elasticities_are_the_laws_derivatives():
    found = claims.elasticities(_saved(noise=0.0))
    size, examples = 1.6e4, 16 * 256.0
    loss = _law(size, examples)
    np.testing.assert_allclose(found[0], ALPHA * 8 * size**-ALPHA / loss, rtol=0.15)
    np.testing.assert_allclose(found[2], BETA * 6 * examples**-BETA / loss, rtol=0.05)
    np.testing.assert_allclose(found[1], 0.1, rtol=1e-6)


def test_the_last_doubling_is_worth_less_to_what_has_stopped():
    steps = np.array([1.0, 2.0, 4.0, 8.0])
    curves = np.array([[[3.0, 2.0, 1.0, 1.0]], [[4.0, 2.0, 1.0, np.nan]]])
    np.testing.assert_allclose(analysis.last_gains(curves, steps)[:, 0], [0, np.log(2)])


def test_the_rate_that_counts_is_chosen_at_every_record():
    losses = xr.DataArray(
        [[[1.0, 3.0, np.nan], [2.0, 1.0, np.nan]], [[2.0, 1.0, 9.0], [2.0, np.nan, 9.0]]],
        dims=("learning_rate", "seed", "step"),
        coords={"learning_rate": [0.1, 0.2], "step": [1, 2, 3]},
    )  # fmt: skip
    found = analysis.best_rate(losses).transpose("seed", "step")
    np.testing.assert_array_equal(found, [[1.0, 3.0, 9.0], [2.0, 1.0, 9.0]])


def test_verdicts_follow_the_curves():
    best, refit = claims.claims(_saved())
    # There the narrowest has stopped and the best size grows, but the batch does most.
    assert (best.id, best.verdict, best.n_runs) == ("scaling/model-size", "corrected", 48)
    assert (refit.id, refit.verdict, refit.n_runs) == ("scaling/hoffmann-refit", "not run", 0)
    assert claims.claims(_saved(grow=False))[0].verdict == "refuted"


@pytest.mark.parametrize(("share", "expected"), [(1.0, "holds"), (0.5, "corrected")])
def test_the_model_has_to_have_the_biggest_effect(monkeypatch, share, expected):
    effect = np.array([[0.2, 0.21, 0.19], [0.05, 0.06, 0.05], [0.1, 0.11, 0.1]])
    effect[0] *= share
    monkeypatch.setattr(claims, "elasticities", lambda dataset: effect)
    monkeypatch.setattr(
        claims, "gains", lambda d, n: np.array([[0.01, 0.02, 0.01], [0.1, 0.11, 0.1]])
    )
    assert claims.claims(_saved())[0].verdict == expected


def test_figures_draw_from_what_was_saved(tmp_path):
    saved = _saved()
    saved.to_netcdf(tmp_path / "saved.nc", engine="h5netcdf")
    found = scaling_laws.figures(xr.load_dataset(tmp_path / "saved.nc", engine="h5netcdf"))
    assert set(found) == {"compute", "best_size"}
    for name, fig in found.items():
        assert isinstance(fig, Figure)
        assert fig.caption
        fig.savefig(tmp_path / f"{name}.svg")


def test_held_out_photograph_tiles_share_no_pixel_with_the_others():
    train, held_out = by_width.photograph_tiles(32)
    assert train.shape[1:] == held_out.shape[1:] == (32, 32, 3)
    seen = {tile.tobytes() for tile in train if np.ptp(tile) > 40}
    assert not any(tile.tobytes() in seen for tile in held_out)


def test_sizes_are_those_of_the_networks():
    at = by_width.sizes("conv-transpose", [32], 24, 32)
    assert at.parameters.tolist() == [49728]
    assert at.flops.tolist() == [6 * 9510912]


SMALL = {
    "nets": ("conv-transpose",), "filters": (1, 2, 4), "colours": 3, "size": 8, "pictures": 64,
    "held_out": 16, "batch": 4, "steps": 16, "most_steps": 32, "every": 2, "subsets": (16,),
    "resamples": 20, "seeds": 2, "budgets": 4, "rates": (0.01,),
}  # fmt: skip


@pytest.mark.slow
def test_the_whole_runs(tmp_path):
    dataset = scaling_laws.run(Config(**SMALL))
    assert {claim.id: claim.verdict for claim in scaling_laws.claims(dataset)} | {
        "scaling/model-size": ""
    } == {"scaling/model-size": "", "scaling/hoffmann-refit": "not run"}
    assert np.isfinite(dataset.subset_loss).all()
    assert dataset.loss.sel(filters=4).count() == 2 * 16 / 2
    dataset.to_netcdf(tmp_path / "saved.nc", engine="h5netcdf")
    xr.testing.assert_equal(xr.load_dataset(tmp_path / "saved.nc", engine="h5netcdf"), dataset)
    assert set(scaling_laws.figures(dataset)) == {"compute", "best_size"}


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"filters": (4, 8, 8)}, "2 widths: expected at least 3"),
        ({"seeds": 1}, "seeds"),
        ({"steps": 15}, "steps is 15: expected at least 8"),
        ({"rates": ()}, "rates are empty"),
        ({"size": 6}, "size is 6"),
        ({"pictures": 7}, "7 training tiles"),
        ({"points": "none.csv"}, "none.csv"),
    ],
)
def test_refusals(wrong, words):
    with pytest.raises(UserError, match=words) as caught:
        scaling_laws.run(Config(**SMALL | wrong))
    assert "\n" not in str(caught.value)


def test_a_bad_points_file_is_one_line(tmp_path):
    bad = tmp_path / "bad.csv"
    bad.write_text("Model Size,Training FLOP,loss\n1e6,-1,2\n")
    with pytest.raises(UserError, match="line 2") as caught:
        scaling_laws.run(Config(points=str(bad), **SMALL))
    assert "\n" not in str(caught.value)
