"""A single process as the only rank of every group, for tests that need no pool."""

from collections.abc import Iterator

import pytest
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_sse.parallel.groups import destroy_groups, init_groups, init_process_group
from tests.model.support import cpu


@pytest.fixture(scope="module")
def groups() -> Iterator[ProcessGroupCollection]:
    init_process_group(cpu())
    yield init_groups()
    destroy_groups()
    dist.destroy_process_group()
