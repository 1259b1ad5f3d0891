"""Training: step, loop, checkpoints, evaluation, recipe and report."""
