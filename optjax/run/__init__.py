"""One run, pure: problems, batches, the step, the trajectory, Flax models, what optax lacks."""
