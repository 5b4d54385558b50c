"""Closed forms for training runs: least squares and the noisy quadratic."""
