"""Gradient noise and batch size: the noise scale, steps to a target, the critical batch size."""
