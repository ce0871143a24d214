"""Fixtures shared with the tests of inference: checkpoints of tiny models."""

from tests.inference.conftest import hybrid, pure

__all__ = ["hybrid", "pure"]
