"""optjax: a training run as a pure function of its hyperparameters and its seed."""
