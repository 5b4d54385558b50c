"""Figures of the recipes."""

import xarray as xr
from matplotlib.figure import Figure


def figures(dataset: xr.Dataset) -> dict[str, Figure]:
    return {}
