"""What all tests share: the worker processes are stopped at the end."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    # Triton's interpreter runs the kernels; it has to be chosen before Triton is imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")

from tests.workers import close_pools


def pytest_sessionfinish(session: pytest.Session) -> None:
    close_pools()
