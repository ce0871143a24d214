"""Fixtures shared with the tests of inference: checkpoints of tiny models, and models loaded in this process."""

from tests.inference.conftest import hybrid, nets, pure

__all__ = ["hybrid", "nets", "pure"]
