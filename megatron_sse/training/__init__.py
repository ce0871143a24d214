"""The trainer: optimizer, learning-rate schedule, training steps, and the loop of a run."""
