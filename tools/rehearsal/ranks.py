"""Stand-ins for torch.distributed: one process that takes itself for one of many, whose peers send what it has."""

from typing import Any

import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_sse.tools.rehearsal.findings import Findings, Kind

NCCL = "nccl"


def install_ranks(rank: int, num_ranks: int, findings: Findings) -> None:
    """Make this process rank `rank` of `num_ranks`, for the rest of its life."""
    init = dist.init_process_group

    def init_process_group(backend: str | None = None, device_id: Any = None, **kwargs: Any) -> None:
        assert backend == NCCL, backend
        if device_id is None:
            findings.note(Kind.NO_DEVICE_ID)
        init("fake", store=FakeStore(), rank=rank, world_size=num_ranks)

    plans: list[Any] = []

    def all_gather_object(object_list: list[Any], obj: Any, *args: Any, **kwargs: Any) -> None:
        findings.note(Kind.OBJECT_COLLECTIVE, "all_gather_object")
        object_list[:] = [obj] * len(object_list)

    def gather_object(obj: Any, object_gather_list: list[Any] | None = None, *args: Any, **kwargs: Any) -> None:
        findings.note(Kind.OBJECT_COLLECTIVE, "gather_object")
        plans[:] = [obj]
        if object_gather_list is not None:
            object_gather_list[:] = [obj] * len(object_gather_list)

    def broadcast_object_list(*args: Any, **kwargs: Any) -> None:
        findings.note(Kind.OBJECT_COLLECTIVE, "broadcast_object_list")

    def scatter_object_list(
        scatter_object_output_list: list[Any], scatter_object_input_list: list[Any] | None = None, **kwargs: Any
    ) -> None:
        findings.note(Kind.OBJECT_COLLECTIVE, "scatter_object_list")
        # Rank 0 gives the others their plans of a checkpoint back, as they sent them.
        scatter_object_output_list[0] = (scatter_object_input_list or plans)[0]

    for stand_in in (
        init_process_group,
        all_gather_object,
        gather_object,
        broadcast_object_list,
        scatter_object_list,
    ):
        setattr(dist, stand_in.__name__, stand_in)
