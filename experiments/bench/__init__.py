"""Timings beside peers, side by side in one run: ``python -m optjax.experiments.bench``."""
