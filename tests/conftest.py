"""What all tests share: the worker processes are stopped at the end."""

import pytest

from tests.workers import close_pools


def pytest_sessionfinish(session: pytest.Session) -> None:
    close_pools()
