"""Gradient noise and what it costs: models whose moments are exact."""
