"""What the comparison of recipes says of a network of our own."""

import numpy as np
import xarray as xr

from optjax.report.claims import Claim, mean_interval, verdict, with_interval

NEEDS = (
    "the study 'ours' or 'comparison'. 'optjax data cifar10 --out horses.npz', then "
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
    above = ends["accuracy"] is not None and ends["accuracy"][0] > table["accuracy"]
    below = ends["loss"] is not None and ends["loss"][1] < table["loss"]
    known = ends["loss"] is not None and bool(np.isfinite(loss).all())
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
            tolerance="holds where the intervals of both accuracy and loss lie beyond the table's",
            n_runs=len(loss),
            interval={"accuracy (%)": ends["accuracy"], "loss (nats)": ends["loss"]},
            verdict=verdict(above and below, reasoning=above or below) if known else "not run",
            evidence="recipes/scores",
            plain_words="A small residual network beats a table of grey levels",
            source_short="beyond the source",
            measured_short=f"{with_interval(accuracy.mean(), ends['accuracy'], 3, ' %')}, table "
            f"{table['accuracy']:.1f} %; {loss.mean():.3f} nats, {table['loss']:.3f}",
            needs=NEEDS,
        )
    ]
