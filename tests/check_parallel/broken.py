"""Faults that tests inject into the processes of check-parallel, and a run with such processes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_sse.check_parallel import processes
from megatron_sse.check_parallel.command import run
from megatron_sse.check_parallel.request import Request
from megatron_sse.config import RunConfig
from megatron_sse.kernels import Routes
from megatron_sse.model import mixer as mixer_module
from megatron_sse.model import projections as projections_module
from megatron_sse.model import router as router_module
from tests.workers import fork_context


def check_broken(config: RunConfig, layouts: list[str], json_path: Path, prepare: Callable[[], None]) -> int:
    """Run the command with an injected fault. Processes are forked, since loading takes longer than computing."""
    settings = json_path.with_suffix(".yaml")
    settings.write_text(config.to_yaml())
    request = Request(config=str(settings), layouts=",".join(layouts), json=json_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes, "get_context", lambda method: fork_context())
        return run(request, prepare)


def hand_off_disabled() -> None:
    """Make every slot start from empty states."""
    mixer_module.begin_exclusive_scan = lambda transition, state, hand_off: (torch.zeros_like(state), lambda x: x)


def router_sum_forgotten() -> None:
    """Leave the gradients of router and low-rank pairs unsummed: each tensor rank keeps the part of its own heads."""
    projections_module.sum_gradient = lambda x, group: x


def picks_depend_on_the_layout() -> None:
    """With more than one rank, shift picks that are not replayed to the next partition."""
    route = router_module.route

    def wrong(prob_TN: Tensor, num_writers: int, num_readers: int, bank_TP: Tensor | None = None) -> Routes:
        routes = route(prob_TN, num_writers, num_readers, bank_TP)
        if bank_TP is None and dist.get_world_size() > 1:
            bank_TP = (routes.bank_TP + 1) % prob_TN.shape[-1]
        return route(prob_TN, num_writers, num_readers, bank_TP)

    router_module.route = wrong


def rank_1_fails() -> None:
    """Make rank 1 fail at the hand-off of states, while rank 0 waits for it."""
    scan = mixer_module.begin_exclusive_scan

    def failing(transition: Tensor, state: Tensor, hand_off: object) -> Any:
        if dist.get_rank() == 1:
            raise ArithmeticError("seeded failure")
        return scan(transition, state, hand_off)

    mixer_module.begin_exclusive_scan = failing
