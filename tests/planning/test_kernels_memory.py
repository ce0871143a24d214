"""Memory that a mixer keeps on the Triton kernels (in Triton's interpreter) is the plan's within 2 %."""

from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from megatron_sse.config import RunConfig
from megatron_sse.model import SSEMixer, build_model
from megatron_sse.parallel.groups import init_groups
from megatron_sse.parallel.layout import TokenLayout
from megatron_sse.planning.activations import recurrent_activations
from megatron_sse.planning.sizes import Sizes
from tests.model.support import cpu, run_config
from tests.planning.test_memory import KeptTensors
from tests.workers import run_workers

pytest.importorskip("triton")

LENGTH = 256
SSE = {"num_heads": 2, "head_dim": 16, "value_head_dim": 32, "num_partitions": 3}
RUNS: list[tuple[dict[str, Any], str]] = [
    (SSE, "fp32"),
    (SSE, "bf16"),
    (SSE | {"recurrence": "gdn", "num_value_heads": 4}, "bf16"),
    (SSE | {"recurrence": "gdn", "num_value_heads": 4, "query_map": "softmax"}, "fp32"),
    (SSE | {"recurrence": "kda", "num_value_heads": 4}, "bf16"),
    (SSE | {"num_partitions": 0, "decay": "constant", "key_map": "silu"}, "bf16"),
]


def make_config(sse: dict[str, Any], precision: str) -> RunConfig:
    model = {"num_layers": 1, "hidden_size": 64, "vocab_size": 64, "layers": "sse", "sse": sse}
    return run_config(model, LENGTH, training={"steps": 1, "global_batch_size": 1, "precision": precision})


def kept_by_mixers() -> list[int]:
    """Return the bytes kept by one forward pass of each run's mixer."""
    found, groups = [], init_groups()
    # All modules that choose between torch and Triton.
    places = [f"megatron_sse.kernels.{name}.use_triton" for name in ("sse", "scan", "routing", "norm", "conv")]
    for place in places:
        mock.patch(place, lambda x: True).start()
    try:
        for sse, precision in RUNS:
            config = make_config(sse, precision)
            [chunk] = build_model(config, groups, cpu())
            [mixer] = [module for module in chunk.modules() if isinstance(module, SSEMixer)]
            layout = TokenLayout.from_starts(np.zeros((1, LENGTH), dtype=bool))
            hidden_LBd = torch.randn(LENGTH, 1, 64, dtype=mixer.config.params_dtype, requires_grad=True)
            kept = KeptTensors([*mixer.parameters(), hidden_LBd])
            with kept:
                mixer(hidden_LBd, None, layout)
            found.append(kept.nbytes)
    finally:
        mock.patch.stopall()
    return found


def test_kept_on_triton() -> None:
    for (sse, precision), kept in zip(RUNS, run_workers(1, kept_by_mixers)[0], strict=True):
        sizes = Sizes(make_config(sse, precision), data_size=1, kernels="triton")
        assert sum(recurrent_activations(sizes, "sse")) == pytest.approx(kept, rel=0.02), (sse, precision)
