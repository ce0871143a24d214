"""Training with softmax layers that convert to zigzag and back has the losses and gradients of one process."""

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from megatron_sse.model import build
from megatron_sse.model.attention import TorchAttention
from megatron_sse.model.backend import choose_attention, choose_backend
from megatron_sse.model.initialize import own_part
from tests.model.documented_attention import DocumentedTEAttention
from tests.model.support import cpu, run_config
from tests.training.support import small_run
from tests.training.test_layouts import DATA, DEEP, Part, train
from tests.workers import run_workers

NUM_STEPS = 3


def train_in_zigzag(folder: Path, sections: dict[str, Any]) -> tuple[list[float], dict[str, Part], int]:
    """Train in fp32, which Transformer Engine's own attention does not support."""
    backend = replace(choose_backend(cpu()), core_attention=DocumentedTEAttention)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "choose_attention", lambda unused, config, device: backend)
        return train(folder, sections, NUM_STEPS)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[float], dict[str, torch.Tensor]]:
    folder = tmp_path_factory.mktemp("zigzag")
    small_run(folder, model=DEEP["model"], data=DATA)
    [(losses, parts, _)] = run_workers(1, train, folder, {"model": DEEP["model"]}, NUM_STEPS)
    return folder, losses, {name: part.gradient for name, part in parts.items()}


@pytest.mark.parametrize(
    ("world_size", "parallel", "recompute"),
    [
        (2, {"context": 2}, "full"),
        (2, {"context": 2, "layout": "zigzag"}, "none"),
        (4, {"context": 2, "tensor": 2, "sequence": True}, "none"),
        (4, {"context": 2, "pipeline": 2}, "full"),
    ],
    ids=str,
)
def test_like_one_process(
    world_size: int,
    parallel: dict[str, Any],
    recompute: str,
    one_process: tuple[Path, list[float], dict[str, torch.Tensor]],
) -> None:
    folder, expected_losses, expected_gradients = one_process
    sections = {"model": DEEP["model"], "parallel": parallel, "training": {"recompute": recompute}}
    for losses, parts, tensor_rank in run_workers(world_size, train_in_zigzag, folder, sections):
        assert losses == pytest.approx(expected_losses, rel=1e-5)
        for name, part in parts.items():
            whole = own_part(expected_gradients[name], part, tensor_rank, parallel.get("tensor", 1))
            assert (part.gradient - whole).norm() < 1e-5 * expected_gradients[name].norm(), name


@pytest.mark.parametrize(
    ("core", "sections"),
    [
        (DocumentedTEAttention, {"training": {"precision": "bf16"}, "parallel": {"context": 2}}),
        (DocumentedTEAttention, {}),
        (TorchAttention, {"parallel": {"context": 2}}),
        (TorchAttention, {"training": {"precision": "bf16"}, "parallel": {"context": 4}}),
    ],
    ids=["bf16", "one context rank", "fp32", "more ranks than heads, with a window"],
)
def test_where_transformer_engine_can_attend(core: type, sections: dict[str, Any]) -> None:
    backend = replace(choose_backend(cpu()), core_attention=DocumentedTEAttention)
    config = run_config(DEEP["model"], **sections)
    hopper = Mock(capability=lambda: (9, 0))
    assert choose_attention(backend, config, hopper).core_attention is core
