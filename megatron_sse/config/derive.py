"""Values that follow from the settings, printed before a run starts."""

from collections import Counter

from megatron_sse.config.context import choose_layout
from megatron_sse.config.run import RunConfig, StageRun, plan_stages
from megatron_sse.config.schema import ModelConfig, ParallelConfig
from megatron_sse.config.weights import model_weights
from megatron_sse.config.world_size import check_world_size
from megatron_sse.errors import UserError

# A chunk's logits in fp32, where training.loss_chunk is null. The weight's gradient is read and written once for each
# chunk, so that small chunks are slow: from a few thousand tokens on, the matrix products take longer than that.
LOGIT_BYTES = 1 << 30
MIN_LOSS_CHUNK = 128


def count_parameters(model: ModelConfig) -> dict[str, int]:
    """Return the number of parameters by part: embedding, output, norms, mlp and the mixers by kind of layer.

    The embedding is counted with its padding; a tied output has no parameters of its own.
    """
    counts = Counter({"embedding": 0, "output": 0})
    for weight in model_weights(model):
        counts[weight.part] += weight.size
    return dict(counts)


def uses_distributed_optimizer(config: RunConfig) -> bool:
    """Check whether optimizer state is split over the data-parallel group: where asked for, and always in bf16.

    Megatron-Core's other optimizer for bf16 cannot save a model that has fp32 parameters (the routers) as well.
    """
    return config.parallel.distributed_optimizer or config.training.precision == "bf16"


def choose_loss_chunk(config: RunConfig) -> int:
    """Return for how many tokens the logits exist at the same time: training.loss_chunk, or what LOGIT_BYTES allow."""
    if config.training.loss_chunk is not None:
        return config.training.loss_chunk
    fp32_row = 4 * config.model.padded_vocab_size // config.parallel.tensor
    return max(MIN_LOSS_CHUNK, LOGIT_BYTES // fp32_row // MIN_LOSS_CHUNK * MIN_LOSS_CHUNK)


def recomputed_parts(config: RunConfig) -> list[str]:
    """Return the parts of every layer that the backward pass computes again, of RECOMPUTED_PARTS.

    They do not overlap with training.recompute: full, which computes complete layers again.
    """
    recompute = config.training.recompute
    if recompute in ("none", "full"):
        return []
    return recompute if isinstance(recompute, list) else [recompute]


def fuses_loss(config: RunConfig, on_gpu: bool) -> bool:
    """Check whether the operations of the cross entropy are fused."""
    return _given(config.training.fused_loss, on_gpu)


def overlaps_gradients(config: RunConfig, on_gpu: bool) -> bool:
    """Check whether gradients are summed during the backward pass."""
    return _given(config.parallel.overlap_gradients, on_gpu)


def overlaps_parameters(config: RunConfig, on_gpu: bool) -> bool:
    """Check whether the weights that other copies updated are gathered during the forward pass."""
    overlaps = overlaps_gradients(config, on_gpu) and uses_distributed_optimizer(config)
    return overlaps and _given(config.parallel.overlap_parameters, True)


def fuses_swiglu(config: RunConfig, on_gpu: bool) -> bool:
    """Check whether the operations of the MLP's activation are fused."""
    return _given(config.training.fused_swiglu, on_gpu)


def describe_speedups(config: RunConfig, on_gpu: bool, copies: int) -> str:
    """Return a line that says what a run overlaps and fuses. copies: ranks that share a gradient."""
    overlapped = {"gradients": overlaps_gradients(config, on_gpu), "weights": overlaps_parameters(config, on_gpu)}
    fused = {"cross entropy": fuses_loss(config, on_gpu), "SwiGLU": fuses_swiglu(config, on_gpu)}
    overlaps = [name for name, is_used in overlapped.items() if is_used and copies > 1]
    fuses = [name for name, is_used in fused.items() if is_used]
    return f"overlapped: {', '.join(overlaps) or 'nothing'}; fused: {', '.join(fuses) or 'nothing'}"


def _given(value: bool | None, default: bool) -> bool:
    return default if value is None else value


def describe_run(config: RunConfig, world_size: int) -> list[str]:
    """Describe a run of `world_size` processes, one fact per line. Raises UserError where sizes do not divide."""
    model, parallel = config.model, config.parallel
    data_size = check_world_size(config, world_size)
    _check_profile_ranks(config, world_size)
    counts = count_parameters(model)
    layers = ", ".join(f"{count} {kind}" for kind, count in Counter(model.layer_kinds()).items())
    parts = ", ".join(f"{name} {count:,}" for name, count in counts.items() if count)
    zigzag, reason = choose_layout(config)
    layout = f"{'zigzag' if zigzag else 'contiguous'} ({reason})"
    return [
        f"layers            {model.num_layers} ({layers}), hidden size {model.hidden_size}",
        f"parameters        {sum(counts.values()):,} ({parts})",
        f"processes         {world_size} (tensor {parallel.tensor} x pipeline {parallel.pipeline} x "
        f"context {parallel.context} x data {data_size})",
        *([f"tensor ranks      {_describe_tensor(parallel)}"] if parallel.tensor > 1 else []),
        *([f"context layout    {layout}"] if parallel.context > 1 else []),
        *(line for stage in plan_stages(config) for line in _describe_stage(config, stage, data_size)),
    ]


def _describe_tensor(parallel: ParallelConfig) -> str:
    """Return who computes what is not split by heads or channels."""
    parts = "norms, residual stream, router and low-rank projections"
    if parallel.sequence:
        return f"split the tokens of {parts} (parallel.sequence)"
    return f"compute {parts} of all tokens, each (parallel.sequence is false)"


def _describe_stage(config: RunConfig, stage: StageRun, data_size: int) -> list[str]:
    """Describe sequences, batches and tokens of a stage, or of the run where it has no stages."""
    training, length, rl = stage.config.training, stage.config.data.sequence_length, stage.config.rl
    if rl is not None:
        return [
            f"answers per step  {rl.rollouts_per_step:,} ({rl.group_size} to each of {rl.prompts_per_step:,} prompts)",
            f"longest answer    {rl.max_new_tokens:,} tokens; packed into sequences of {length:,}",
            f"algorithm         {rl.algorithm}, {rl.updates_per_batch} updates per step, {stage.steps:,} steps",
        ]
    tokens = training.global_batch_size * length
    micro_batches = training.global_batch_size // (training.micro_batch_size * data_size)
    lines = [
        f"tokens per step   {tokens:,} ({training.global_batch_size} sequences of {length:,})",
        f"micro-batches     {micro_batches} per step of {training.micro_batch_size} sequences each",
        f"total tokens      {tokens * stage.steps:,} in {stage.steps:,} steps",
    ]
    if config.stages is None:
        return lines
    span = f"steps {stage.first_step + 1:,} to {stage.end:,}"
    return [f"stage {stage.number + 1} of {len(config.stages)}      {span}", *(f"  {line}" for line in lines)]


def _check_profile_ranks(config: RunConfig, world_size: int) -> None:
    beyond = [rank for rank in config.monitor.profile_ranks if rank >= world_size]
    if beyond:
        raise UserError(f"monitor.profile_ranks: got {beyond[0]}, allowed ranks below {world_size}, the world size")
