"""Checkpoints: model, optimizer and progress of the run, in files that any layout can read."""
