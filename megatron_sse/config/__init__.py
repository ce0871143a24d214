"""The settings of a run: YAML to a checked RunConfig."""

from megatron_sse.config.checks import check_world_size
from megatron_sse.config.context import attends_over_context, attention_kind, choose_layout
from megatron_sse.config.derive import uses_distributed_optimizer
from megatron_sse.config.ignored import ignored_settings
from megatron_sse.config.load import load_config
from megatron_sse.config.megatron import transformer_settings
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
    RunConfig,
    SoftmaxConfig,
    Source,
    SSEConfig,
    TrainingConfig,
)
from megatron_sse.config.stages import StageRun, longest_stage, plan_stages, stage_of_step

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
    "RunConfig",
    "SSEConfig",
    "SoftmaxConfig",
    "Source",
    "StageRun",
    "TrainingConfig",
    "attends_over_context",
    "attention_kind",
    "check_world_size",
    "choose_layout",
    "ignored_settings",
    "load_config",
    "longest_stage",
    "plan_stages",
    "stage_of_step",
    "transformer_settings",
    "uses_distributed_optimizer",
]
