"""Recall tasks whose samples are made of a seed: for training, validation and evaluation."""
