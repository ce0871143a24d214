"""The settings of a run: from YAML to a checked RunConfig."""

from megatron_sse.config.context import attends_over_context, attention_kind, choose_hand_off, choose_layout
from megatron_sse.config.derive import (
    choose_loss_chunk,
    describe_speedups,
    fuses_loss,
    overlaps_gradients,
    overlaps_parameters,
    recomputed_parts,
    uses_distributed_optimizer,
)
from megatron_sse.config.distill import DistillConfig
from megatron_sse.config.ignored import ignored_settings
from megatron_sse.config.load import load_config
from megatron_sse.config.megatron import transformer_settings
from megatron_sse.config.rl import RLConfig
from megatron_sse.config.run import RunConfig, StageRun, longest_stage, plan_stages, stage_of_step
from megatron_sse.config.schema import (
    CheckpointConfig,
    DataConfig,
    ModelConfig,
    MonitorConfig,
    MQARTask,
    NeedleTask,
    NeedleVariant,
    OptimizerConfig,
    ParallelConfig,
    SoftmaxConfig,
    Source,
    SSEConfig,
    TrainingConfig,
)
from megatron_sse.config.world_size import check_world_size, count_processes

__all__ = [
    "CheckpointConfig",
    "DataConfig",
    "MQARTask",
    "ModelConfig",
    "MonitorConfig",
    "NeedleTask",
    "NeedleVariant",
    "OptimizerConfig",
    "ParallelConfig",
    "DistillConfig",
    "RLConfig",
    "RunConfig",
    "SSEConfig",
    "SoftmaxConfig",
    "Source",
    "StageRun",
    "TrainingConfig",
    "attends_over_context",
    "attention_kind",
    "check_world_size",
    "choose_hand_off",
    "choose_layout",
    "choose_loss_chunk",
    "count_processes",
    "fuses_loss",
    "ignored_settings",
    "load_config",
    "longest_stage",
    "describe_speedups",
    "overlaps_gradients",
    "overlaps_parameters",
    "plan_stages",
    "recomputed_parts",
    "stage_of_step",
    "transformer_settings",
    "uses_distributed_optimizer",
]
