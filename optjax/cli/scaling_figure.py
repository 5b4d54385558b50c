"""The figure of a fitted scaling law: the runs with what is foretold of them, and the outliers."""

from typing import TYPE_CHECKING, Any

import numpy as np

from optjax.report import style

if TYPE_CHECKING:
    from optjax.scaling import Bootstrap, Sensitivity

_UNITS = {"N": "parameters N", "D": "tokens D", "S": "steps S", "C": "training FLOPs C"}


def figure(refits: "Bootstrap", without: "Sensitivity | None", dropped: int) -> Any:
    """Draw the law with its 95 % band over the runs, and its exponents without outliers.

    Args:
      refits: the bootstrap of the fit. without: its outlier sensitivity, if there is one.
      dropped: of the highest losses that the fit left out.
    """
    fig, axes = style.figure("wide", 1, 2)
    from optjax.scaling import falling

    form = refits.fit.form
    sound = falling(refits)
    if form.name == "hoffmann" and sound is not None:
        _frontier(axes[0], sound)
    elif len(form.sizes) == 1:
        _curve(axes[0], refits)
    else:
        _against(axes[0], refits)
    _exponents(axes[1], refits, without, dropped)
    return fig


def _band(ax: Any, x: Any, middle: Any, many: Any, label: str) -> None:
    with np.errstate(all="ignore"):
        low, high = np.percentile(many, [2.5, 97.5], axis=0)
    ax.plot(x, middle, label=label, color=style.COLOURS[1])
    style.band(ax, x, low, high, label="95 % interval")


def _dots(ax: Any, x: Any, loss: Any) -> None:
    ax.plot(
        *(x, loss), ".", color=style.COLOURS[0], markersize=3.5, alpha=0.7, label="runs", zorder=1
    )


def _finish(ax: Any, x: str, y: str, title: str) -> None:
    ax.set_xlabel(x)
    ax.set_ylabel(y)
    ax.set_title(title, loc="left")
    ax.legend(frameon=False, fontsize=8)


def _frontier(ax: Any, refits: "Bootstrap") -> None:
    import jax

    from optjax.scaling import allocate_hoffmann

    runs = refits.fit.runs
    C = np.geomspace(runs.C.min(), 10 * runs.C.max(), 60)  # pyright: ignore[reportOptionalMemberAccess]
    with jax.enable_x64(True):
        middle = np.asarray(allocate_hoffmann(refits.fit.law, C).loss)
        laws = refits.fit.form.kind(*(x[:, None] for x in refits.law))
        many = np.asarray(allocate_hoffmann(laws, C[None]).loss)
    _dots(ax, runs.C, runs.loss)
    _band(ax, C, middle, many, "least loss at C = 6ND")
    ax.set_xscale("log")
    _finish(ax, _UNITS["C"], "loss (nats)", "Loss against compute")


def _curve(ax: Any, refits: "Bootstrap") -> None:
    from optjax.scaling import predictions

    size = refits.fit.form.sizes[0]
    x = getattr(refits.fit.runs, size)
    line = np.geomspace(x.min(), 10 * x.max(), 60)
    one = refits._replace(law=refits.fit.form.kind(*(np.array([v]) for v in refits.fit.law)))
    _dots(ax, x, refits.fit.runs.loss)
    _band(ax, line, predictions(one, line)[0], predictions(refits, line), refits.fit.form.name)
    ax.set_xscale("log")
    _finish(ax, _UNITS[size], "loss (nats)", "Loss against size")


def _against(ax: Any, refits: "Bootstrap") -> None:
    from optjax.scaling import predictions

    runs = refits.fit.runs
    predicted = runs.loss * np.exp(-refits.fit.residuals)
    many = predictions(refits, *(getattr(runs, size) for size in refits.fit.form.sizes))
    with np.errstate(all="ignore"):
        low, high = np.percentile(many, [2.5, 97.5], axis=0)
        reach = np.abs(np.stack([predicted - low, high - predicted]))
    ax.errorbar(
        *(runs.loss, predicted, reach), fmt=".", markersize=3.5, elinewidth=0.7,
        color=style.COLOURS[0], label="runs, 95 % interval of the law",
    )  # fmt: skip
    ends = [runs.loss.min(), runs.loss.max()]
    ax.plot(ends, ends, color=style.COLOURS[1], label="equal")
    _finish(ax, "measured loss (nats)", "fitted loss (nats)", "Fitted against measured loss")


def _exponents(ax: Any, refits: "Bootstrap", without: "Sensitivity | None", dropped: int) -> None:
    symbols = {"alpha": "α", "beta": "β", "exponent": "α", "alpha_N": "α_N", "alpha_D": "α_D"}
    names = [n for n in refits.law._fields if n.startswith(("alpha", "beta", "exponent"))]
    for i, name in enumerate(names):
        look: dict[str, Any] = {"color": style.COLOURS[i], "marker": style.MARKERS[i]}
        value = getattr(refits.fit.law, name)
        low, high = np.percentile(getattr(refits.law, name), [2.5, 97.5])
        if without is not None:
            ax.plot(without.left_out, getattr(without.law, name), markersize=3.5, **look)
        ax.errorbar(
            [dropped + 0.12 * i], [value], [[max(value - low, 0)], [max(high - value, 0)]],
            capsize=3, linestyle="none", label=f"{symbols.get(name, name)}, 95 % interval", **look,
        )  # fmt: skip
    ax.xaxis.get_major_locator().set_params(integer=True)
    _finish(ax, "highest losses left out (runs)", "exponent", "Exponents without outliers")
