"""The trainer: optimizer, schedules, steps, checkpoints, and the run that they make."""
