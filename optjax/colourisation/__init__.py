"""Colourisation: grey picture in, one of a palette's colours per pixel out."""
