"""Checkpoints of tiny models: those of the tests of inference."""

from tests.inference.conftest import hybrid, pure

__all__ = ["hybrid", "pure"]
