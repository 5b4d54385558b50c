"""What the comparison of recipes says of a network of our own."""

import numpy as np
import xarray as xr

from optjax.report.claims import Claim, mean_interval, verdict, with_interval

NEEDS = (
    "intervals that do not hold the table's value: more seeds, or steps. "
    "'optjax data cifar10 --out horses.npz', then "
    "'optjax run recipes --data horses.npz --study comparison --seeds 5'"
)


def claims(dataset: xr.Dataset) -> list[Claim]:
    if "ours" not in dataset["recipe"].values:
        return []
    ours = dataset.sel(recipe="ours")
    accuracy, loss = 100 * ours["accuracy"].values, ours["loss"].values
    table = {"accuracy": 100 * float(dataset["baseline_accuracy"])}
    table["loss"] = float(dataset["baseline_loss"])
    ends = {"accuracy": mean_interval(accuracy), "loss": mean_interval(loss)}
    # 1: the whole interval is better than the table, −1: worse, 0: it holds the table's value.
    sides = [
        _side(ends["accuracy"], table["accuracy"]),
        -_side(ends["loss"], table["loss"]),
    ]
    known = any(sides) and bool(np.isfinite([*accuracy, *loss]).all())
    others = {
        f"{name} of {net} ({unit})": factor * float(dataset[name].sel(recipe=net).mean())
        for net in dataset["recipe"].values.tolist()
        if net != "ours"
        for name, factor, unit in (("accuracy", 100, "%"), ("loss", 1, "nats"))
    }
    return [
        Claim(
            id="colourisation/better-than-a-table",
            statement="A small residual network beats the majority colour of each pixel's own grey "
            f"level. Found on {dataset.attrs['data']}, after {dataset.attrs['steps']} steps.",
            source="beyond the source",
            measured={
                "accuracy (%)": float(accuracy.mean()),
                "loss (nats)": float(loss.mean()),
                "accuracy of the majority colour (%)": table["accuracy"],
                "loss of the grey level's table (nats)": table["loss"],
                **others,
                "parameters": int(ours["parameters"]),
                "data": dataset.attrs["note"],
            },
            tolerance="holds: the intervals of accuracy and loss are better than the table's; "
            "corrected: one of them; not run: both hold the table's value",
            n_runs=len(loss),
            interval={"accuracy (%)": ends["accuracy"], "loss (nats)": ends["loss"]},
            verdict=verdict(min(sides) > 0, reasoning=max(sides) > 0) if known else "not run",
            evidence="recipes/scores",
            plain_words="A small residual network beats a table of grey levels",
            source_short="beyond the source",
            measured_short=f"{with_interval(accuracy.mean(), ends['accuracy'], 3, ' %')}, table "
            f"{table['accuracy']:.1f} %; {loss.mean():.3f} nats, {table['loss']:.3f}",
            needs=NEEDS,
        )
    ]


def _side(interval: list[float] | None, value: float) -> int:
    """Return 1 where an interval lies above a value, −1 where below, else 0."""
    return 0 if interval is None else (interval[0] > value) - (interval[1] < value)
