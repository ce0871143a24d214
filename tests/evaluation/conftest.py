"""Checkpoints of tiny models, and one of them loaded in this process: those of the tests of inference."""

from tests.inference.conftest import hybrid, nets, pure

__all__ = ["hybrid", "nets", "pure"]
