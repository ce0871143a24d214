"""Set-up of kernel tests: uninitialised memory is filled with NaN, and torch uses one thread."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    # On a GPU some of torch's sums have no deterministic implementation.
    torch.use_deterministic_algorithms(True, warn_only=torch.cuda.is_available())
    assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)
