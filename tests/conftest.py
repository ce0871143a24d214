"""What all tests share: the worker processes are stopped at the end."""

import os
import signal

import pytest

# Triton's interpreter runs the kernels on the CPU; it has to be chosen before Triton is imported.
os.environ.setdefault("TRITON_INTERPRET", "1")

from tests.workers import close_pools

# Ignored where a shell without job control started the tests in the background, and so by all that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_sessionfinish(session: pytest.Session) -> None:
    close_pools()
