"""Convolutional networks: geometry, fast convolutions, layers."""
