"""One forward and backward of softmax attention on every rank of a world."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_sse.model.attention import SoftmaxAttention
from megatron_sse.model.norm import RMSNorm
from megatron_sse.parallel.groups import init_groups
from megatron_sse.parallel.sharding import ContextShard
from megatron_sse.parallel.traffic import Traffic
from tests.model.mixer_runs import Mutation, Results, forward_backward
from tests.model.support import HIDDEN, draw_weights, layout_of

NUM_HEADS = 4


@dataclass(frozen=True)
class Case:
    """Settings of a layer, and the document lengths of each sequence."""

    lengths: Sequence[Sequence[int]]
    num_kv_heads: int = 2
    head_dim: int = 6
    window: int | None = None
    rotary_base: float = 100.0
    qk_norm: bool = False


def make_attention(
    case: Case,
    core: type,
    groups: ProcessGroupCollection,
    sequence: bool = False,
    dtype: torch.dtype = torch.float64,
    cp_comm_type: str | None = None,
) -> SoftmaxAttention:
    """Return a layer whose weights are the same in every layout."""
    model_parallel_cuda_manual_seed(1)
    config = TransformerConfig(
        num_layers=1,
        hidden_size=HIDDEN,
        num_attention_heads=NUM_HEADS,
        num_query_groups=case.num_kv_heads,
        kv_channels=case.head_dim,
        params_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        use_cpu_initialization=True,
        add_bias_linear=False,
        attention_dropout=0.0,
        qk_layernorm=case.qk_norm,
        tensor_model_parallel_size=groups.tp.size(),
        context_parallel_size=groups.cp.size(),
        sequence_parallel=sequence and groups.tp.size() > 1,
    )
    submodules = SelfAttentionSubmodules(
        linear_qkv=ColumnParallelLinear,
        core_attention=core,
        linear_proj=RowParallelLinear,
        q_layernorm=RMSNorm if case.qk_norm else None,
        k_layernorm=RMSNorm if case.qk_norm else None,
    )
    layer = SoftmaxAttention(config, submodules, 1, case.rotary_base, case.window, 0, cp_comm_type, groups)
    draw_weights(layer, groups)
    return layer


def run_attention(
    cases: list[Case],
    core: type,
    context: int = 1,
    sequence: bool = False,
    zigzag: bool = False,
    mutation: Mutation | None = None,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
    cp_comm_type: str | None = None,
) -> list[Results]:
    """Return output and all gradients of each case on this rank; the remaining ranks form the tensor group."""
    groups = init_groups(tensor=dist.get_world_size() // context, context=context)
    shard = ContextShard(groups.cp.rank(), context, zigzag)
    results = []
    with pytest.MonkeyPatch.context() as patch, torch.device(device):
        if mutation is not None:
            mutation(patch)
        for case in cases:
            layer = make_attention(case, core, groups, sequence, dtype, cp_comm_type)
            results.append(forward_backward(layer, layout_of(case.lengths, shard=shard, device=device), groups))
    return results


def calls_of(case: Case, core: type, context: int, sequence: bool, zigzag: bool) -> list[dict[str, Any]]:
    """Return the calls that a recording core attention got in one forward pass."""
    groups = init_groups(tensor=dist.get_world_size() // context, context=context)
    shard = ContextShard(groups.cp.rank(), context, zigzag)
    layer = make_attention(case, core, groups, sequence, cp_comm_type="a2a")
    forward_backward(layer, layout_of(case.lengths, shard=shard), groups)
    return [call | {"kind": layer.core_attention.cp_comm_type} for call in layer.core_attention.calls]


def traffic_of(case: Case, core: type, context: int, sequence: bool) -> Traffic:
    """Return the traffic of one forward and backward pass on contiguous parts."""
    groups = init_groups(tensor=dist.get_world_size() // context, context=context)
    layer = make_attention(case, core, groups, sequence)
    layout = layout_of(case.lengths, shard=ContextShard(groups.cp.rank(), context))
    with Traffic() as traffic:
        hidden = torch.randn(layout.length // (groups.tp.size() if sequence else 1), layout.batch_size, HIDDEN)
        layer(hidden.double().requires_grad_(), None, layout)[0].sum().backward()
    return traffic
