"""What a network is trained and judged by: pictures, a palette, labels, the baseline to beat."""

from dataclasses import dataclass, replace

import numpy as np
from flax.linen import Module
from numpy.typing import NDArray

from optjax.colourisation.baseline import BaselineResult, GreyLevelBaseline
from optjax.colourisation.palette import grey, kmeans_palette, load_palette, nearest_colour
from optjax.colourisation.pictures import Pictures
from optjax.colourisation.problem import colourisation_problem
from optjax.run.problems import Problem

Labelled = tuple[NDArray[np.float32], NDArray[np.int32]]
"""Grey (n, H, W, 1) and labels (n, H, W)."""


@dataclass(frozen=True, eq=False)
class Task:
    """Pictures with the palette's nearest colour for every pixel. See `make_task`."""

    pictures: Pictures
    palette: NDArray[np.float64]  # (K, 3)
    train: Labelled
    validation: Labelled
    grey_levels: GreyLevelBaseline
    baseline: BaselineResult  # that of the grey levels, on the validation pictures

    def problem(self, net: Module) -> Problem:
        """Make the problem of training a network on it; see `colourisation_problem`."""
        return colourisation_problem(net, self.train, self.validation)


def make_task(
    pictures: Pictures,
    colours: int = 24,
    palette: str | None = None,
    most: int | None = None,
    seed: int = 0,
) -> Task:
    """Label pictures with the colours of a palette.

    Args:
      pictures: as `load_pictures` gives them.
      colours: K.
      palette: FILE.npy; None: k-means of the training pictures.
      most: training pictures, drawn from those that there are; None: all.
      seed: draws them, and the palette.

    Raises:
      UserError: a palette that cannot be read, or has not K colours.

    >>> from optjax.colourisation.pictures import load_pictures
    >>> task = make_task(load_pictures(None), colours=4, most=10)
    >>> [part.shape for part in (*task.train, task.palette)]
    [(10, 32, 32, 1), (10, 32, 32), (4, 3)]
    """
    if most is not None and most < len(pictures.train):
        drawn = np.random.default_rng(seed).choice(len(pictures.train), most, replace=False)
        pictures = replace(pictures, train=pictures.train[np.sort(drawn)])
    if palette is None:
        found = kmeans_palette(pictures.train, colours, seed)
    else:
        found = load_palette(palette, colours)
    train, validation = (
        (grey(part), nearest_colour(part, found)) for part in (pictures.train, pictures.validation)
    )
    baseline = GreyLevelBaseline.fit(pictures.train, train[1], colours)
    judged = baseline.evaluate(pictures.validation, validation[1])
    return Task(pictures, found, train, validation, baseline, judged)
