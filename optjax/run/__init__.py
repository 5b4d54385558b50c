"""One run as a pure function: problems, batches, steps, trajectories, optimisers, Flax models."""
