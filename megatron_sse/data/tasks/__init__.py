"""Recall tasks whose samples are generated from a seed: for training, validation and evaluation."""
