"""Transformer Engine's context parallelism on two GPUs, next to its own attention on one. Run by name:

pytest tests/model/gpu_te_context.py
"""

import pytest
import torch

from megatron_sse.model.attention import TEAttention, TorchAttention
from tests.model.attention_runs import Case, run_attention
from tests.workers import run_workers

PACKED = Case(((130, 221, 161), (1, 2, 3, 506)), head_dim=64, qk_norm=True)
EVEN = Case(((128, 384), (512,)), head_dim=64)
WHOLE = Case(((512,), (512,)), head_dim=64)
RUNS = {
    "p2p, packed": (PACKED, "p2p", False),
    "p2p, packed, zigzag": (PACKED, "p2p", True),
    "p2p, no padding": (EVEN, "p2p", False),
    "p2p, one document": (WHOLE, "p2p", True),
    "p2p, one document, contiguous": (WHOLE, "p2p", False),
    "p2p, one document of an odd length": (Case(((510,),), head_dim=64), "p2p", False),
    "all_gather, window": (Case(WHOLE.lengths, head_dim=64, window=100), "all_gather", True),
    "a2a, packed, window": (Case(PACKED.lengths, head_dim=64, window=100), "a2a", False),
    "a2a, one document": (WHOLE, "a2a", True),
}


@pytest.mark.parametrize("name", RUNS)
def test_like_one_gpu(name: str) -> None:
    """The error against fp64 is at most twice that of one GPU in bf16."""
    case, kind, zigzag = RUNS[name]
    on_gpu = {"device": "cuda"}
    [[exact]] = run_workers(1, run_on, [case], TorchAttention, {"dtype": torch.float64} | on_gpu, gpus=True)
    [[single]] = run_workers(1, run_on, [case], TEAttention, {"dtype": torch.bfloat16} | on_gpu, gpus=True)
    options = {"dtype": torch.bfloat16, "context": 2, "zigzag": zigzag, "cp_comm_type": kind} | on_gpu
    for [results] in run_workers(2, run_on, [case], TEAttention, options, gpus=True):
        assert results.keys() == exact.keys()
        for tensor, result in results.items():
            assert result.error(exact[tensor]) < 2 * single[tensor].error(exact[tensor]), tensor


def run_on(cases: list[Case], core: type, options: dict):
    """Call run_attention with keyword options."""
    return run_attention(cases, core, **options)
