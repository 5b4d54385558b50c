"""What a run should do, in closed form: least squares and the noisy quadratic."""
