"""A small plain GPT of Megatron-Core with softmax attention and the same weights in every layout."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from zlib import crc32

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer import TransformerConfig

from megatron_sse.parallel.groups import init_groups

VOCAB, LENGTH, GLOBAL_BATCH = 128, 16, 4


@dataclass(frozen=True)
class Layout:
    """The split of the model; data parallelism takes the remaining processes."""

    tensor: int = 1
    pipeline: int = 1
    virtual_pipeline: int = 1
    distributed_optimizer: bool = False
    recompute: bool = False


def build_chunks(layout: Layout, groups: ProcessGroupCollection) -> list[GPTModel]:
    """Return the model chunks of this rank, before DDP, with weights that depend only on their names."""
    model_parallel_cuda_manual_seed(1, force_reset_rng=True)
    interleaved = layout.virtual_pipeline > 1
    config = TransformerConfig(
        num_layers=4,
        hidden_size=32,
        num_attention_heads=4,
        ffn_hidden_size=64,
        normalization="RMSNorm",
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline if interleaved else None,
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        pipeline_dtype=torch.float32,
        use_cpu_initialization=True,
        calculate_per_token_loss=True,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        recompute_granularity="full" if layout.recompute else None,
        recompute_method="uniform" if layout.recompute else None,
        recompute_num_layers=1 if layout.recompute else None,
    )
    chunks = []
    for stage in range(layout.virtual_pipeline):
        chunk = GPTModel(
            config,
            get_gpt_layer_local_spec(normalization="RMSNorm"),
            VOCAB,
            LENGTH,
            pre_process=groups.pp.rank() == 0 and stage == 0,
            post_process=groups.pp.rank() == groups.pp.size() - 1 and stage == layout.virtual_pipeline - 1,
            position_embedding_type="rope",
            vp_stage=stage if interleaved else None,
            pg_collection=groups,
        )
        for name, parameter in named_parameters(chunk):
            _fill(name, parameter, groups)
        chunks.append(chunk)
    return chunks


def named_parameters(chunk: GPTModel) -> Iterator[tuple[str, Any]]:
    """Yield parameters with names that count the layers of the complete model."""
    for name, parameter in chunk.named_parameters():
        parts = name.split(".")
        if parts[:2] == ["decoder", "layers"]:
            parts[2] = str(chunk.decoder.layers[int(parts[2])].layer_number - 1)
        yield ".".join(parts), parameter


def _fill(name: str, parameter: Any, groups: ProcessGroupCollection) -> None:
    shape = list(parameter.shape)
    split = getattr(parameter, "tensor_model_parallel", False)
    if split:
        shape[parameter.partition_dim] *= groups.tp.size()
    whole = torch.randn(shape, generator=torch.Generator().manual_seed(crc32(name.encode()))) * 0.1
    whole += 1.0 if len(shape) == 1 else 0.0
    if split:
        whole = whole.chunk(groups.tp.size(), parameter.partition_dim)[groups.tp.rank()]
    parameter.data.copy_(whole)


def wrap(chunks: list[GPTModel], layout: Layout, groups: ProcessGroupCollection) -> list[DistributedDataParallel]:
    """Wrap every chunk in Megatron's DDP, with gradients in fp32."""
    settings = DistributedDataParallelConfig(
        use_distributed_optimizer=layout.distributed_optimizer, grad_reduce_in_fp32=True
    )
    return [
        DistributedDataParallel(chunk.config, settings, chunk, disable_bucketing=stage > 0, pg_collection=groups)
        for stage, chunk in enumerate(chunks)
    ]


def tokens_of_step(step: int) -> torch.Tensor:
    """Return tokens [GLOBAL_BATCH, LENGTH + 1], int64, the same in every layout."""
    generator = torch.Generator().manual_seed(100 + step)
    return torch.randint(VOCAB, (GLOBAL_BATCH, LENGTH + 1), generator=generator)


def micro_batches(step: int, groups: ProcessGroupCollection) -> list[torch.Tensor]:
    """Return the sequences of this data-parallel rank, one per micro-batch."""
    return list(tokens_of_step(step)[groups.dp.rank() :: groups.dp.size()].split(1))


def full_gradients(chunks: list[DistributedDataParallel], groups: ProcessGroupCollection) -> dict[str, torch.Tensor]:
    """Return the complete gradients of this rank's layers, gathered over the tensor and (if sharded) data groups."""
    for chunk in chunks:
        for bucket in (bucket for buffer in chunk.buffers for bucket in buffer.buckets):
            if chunk.ddp_config.use_distributed_optimizer:
                shard = bucket.grad_data.chunk(groups.dp.size())[groups.dp.rank()].clone()
                dist.all_gather_into_tensor(bucket.grad_data, shard, group=groups.dp)
    gradients = {}
    for chunk in chunks:
        for name, parameter in named_parameters(chunk.module):
            gradient = parameter.main_grad.clone()
            if getattr(parameter, "tensor_model_parallel", False):
                shards = [torch.empty_like(gradient) for _ in range(groups.tp.size())]
                dist.all_gather(shards, gradient, group=groups.tp)
                gradient = torch.cat(shards, parameter.partition_dim)
            gradients[name] = gradient
    return gradients


def train(layout: Layout, num_steps: int) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Train some steps and return the mean loss of each (last stage only) and the gradients of the first."""
    groups = init_groups(layout.tensor, layout.pipeline, layout.virtual_pipeline)
    chunks = wrap(build_chunks(layout, groups), layout, groups)
    config = chunks[0].config
    optimizer = get_megatron_optimizer(
        OptimizerConfig(lr=1e-2, use_distributed_optimizer=layout.distributed_optimizer),
        chunks,
        use_gloo_process_groups=False,
        pg_collection=groups,
    )
    config.finalize_model_grads_func = finalize_model_grads
    config.grad_scale_func = optimizer.scale_loss
    config.no_sync_func = [chunk.no_sync for chunk in chunks] if len(chunks) > 1 else chunks[0].no_sync
    losses: list[float] = []
    gradients: dict[str, torch.Tensor] = {}
    for step in range(num_steps):
        for chunk in chunks:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        parts = micro_batches(step, groups)
        iterators = [iter(parts) for _ in chunks]
        sums = get_forward_backward_func()(
            forward_step_func=_forward_step,
            data_iterator=iterators,
            model=chunks,
            num_microbatches=len(parts),
            seq_length=LENGTH,
            micro_batch_size=1,
        )
        gradients = gradients or full_gradients(chunks, groups)
        optimizer.step()
        if sums:
            total = torch.stack(sums).sum()
            dist.all_reduce(total, group=groups.dp)
            losses.append(total.item() / (GLOBAL_BATCH * LENGTH))
    return losses, gradients


def _forward_step(iterator: Iterator[torch.Tensor], model: Any) -> tuple[torch.Tensor, Any]:
    sequence_BL = next(iterator)
    output = model(sequence_BL[:, :-1], None, None, labels=sequence_BL[:, 1:].contiguous())
    return output, _sum_of_losses


def _sum_of_losses(loss_BL: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    loss = loss_BL.float().sum()
    return loss, torch.tensor(loss_BL.numel(), dtype=torch.int), loss.detach()
