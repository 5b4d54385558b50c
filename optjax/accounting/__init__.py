"""Weights, outputs, connections, operations and memory of any traced network."""
