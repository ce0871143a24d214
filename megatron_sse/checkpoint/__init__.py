"""Checkpoints: model, optimizer and place in the run, in files that any layout can read."""
