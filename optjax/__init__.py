"""optjax: a training run is a pure function of its hyperparameters and its seed.

The public names are listed in `__init__.pyi`; each is imported when it is first used, so that
`optjax --help` does not wait for jax.
"""

import os
from importlib import metadata

import lazy_loader

__version__ = "0.1.0"


def _prefer_fast_convolutions() -> None:
    """Leave convolutions out of the library that XLA gives them to on the CPU, where it is slower.

    A training step of a network takes a fifth less time on jax 0.10, and on 0.12 the same or a
    little less. No option of a program reaches a user's own ``jax.jit(run)``; this one reaches
    every program compiled after the import, if XLA has compiled none before it.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if metadata.version("jax").startswith(("0.10.", "0.11.", "0.12.")) and "ynn" not in flags:
        chosen = "--xla_cpu_experimental_ynn_fusion_type=-individual_convolution"
        os.environ["XLA_FLAGS"] = f"{flags} {chosen}".strip()


_prefer_fast_convolutions()

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
