"""The settings of a run, section by section. configs/reference.yaml says what each key means."""

from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from megatron_sse.config.checks import find_problem, show
from megatron_sse.config.pattern import expand_pattern

Recurrence = Literal["gla", "gdn"]
KeyMap = Literal["softmax", "silu", "topk_softmax", "one_minus_decay"]

Count = Annotated[int, Field(ge=1)]
Size0 = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]

# Default of a setting that may be left out or null and is worked out from the others once they are known.
DERIVED: Any = None


class Section(BaseModel):
    """A section: no unknown keys, no silent conversions, and null allowed wherever the default is null."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _drop_null(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        nullable = {name for name, field in cls.model_fields.items() if field.default is None}
        return {key: value for key, value in values.items() if value is not None or key not in nullable}


class SSEConfig(Section):
    """Settings of sse, gla and gdn layers; gla and gdn are the same layer without partitions."""

    recurrence: Recurrence = "gla"
    num_heads: Count = DERIVED
    head_dim: Count = DERIVED
    value_head_dim: Count = DERIVED
    num_value_heads: Count = DERIVED
    num_partitions: Size0 = 4
    num_writers: Count = 1
    num_readers: Count = 1
    form: Literal["varlen", "mask"] = "varlen"
    weight_writes: bool = True
    weight_reads: bool = True
    gate: Literal["post_norm", "reference"] = "post_norm"
    query_map: Literal["silu", "softmax"] = "silu"
    key_map: KeyMap | None = None
    key_topk: Count | None = None
    decay: Literal["gate", "constant", "none"] = "gate"
    decay_low_rank: Count = 16
    decay_normalizer: Positive = 16.0
    negative_eigenvalues: bool = False
    output_gate: bool = True
    short_convolution: Size0 = 0
    balance_loss: NonNegative = 0.01

    @model_validator(mode="after")
    def _derive(self) -> "SSEConfig":
        if self.value_head_dim is None:
            self.value_head_dim = self.head_dim
        if self.num_value_heads is None:
            self.num_value_heads = self.num_heads
        return self

    def key_map_of(self, recurrence: Recurrence) -> KeyMap:
        """The map applied to keys: softmax for gla and silu (then the L2 norm) for gdn unless set."""
        return self.key_map or ("softmax" if recurrence == "gla" else "silu")


class RotaryScaling(Section):
    """Rotary frequencies of models whose context was extended: all divided by `factor`, or, where the length that the
    model was made for is given, those alone that turn few times in it (Llama 3)."""

    factor: Annotated[float, Field(ge=1)]
    original_length: Count | None = None
    low_turns: Positive = 1.0
    high_turns: Positive = 4.0


class SoftmaxConfig(Section):
    """Settings of softmax layers."""

    num_heads: Count = DERIVED
    head_dim: Count = DERIVED
    num_kv_heads: Count = DERIVED
    window: Count | None = None
    rotary_base: NonNegative = 10000.0
    rotary_scaling: RotaryScaling | None = None
    qk_norm: bool = False
    qkv_bias: bool = False

    @model_validator(mode="after")
    def _derive(self) -> "SoftmaxConfig":
        if self.num_kv_heads is None:
            self.num_kv_heads = self.num_heads
        return self


class ModelConfig(Section):
    num_layers: Count
    hidden_size: Count
    ffn_hidden_size: Count = DERIVED
    vocab_size: Count
    vocab_multiple: Count = 128
    layers: str | list[str]
    norm_epsilon: Positive = 1e-5
    init_std: Positive = 0.02
    tie_embeddings: bool = False
    sse: SSEConfig = Field(default_factory=SSEConfig)
    softmax: SoftmaxConfig = Field(default_factory=SoftmaxConfig)
    transformer: dict[str, Any] = Field(default_factory=dict)

    @field_validator("layers", mode="before")
    @classmethod
    def _check_pattern(cls, layers: Any) -> Any:
        if not isinstance(layers, str) and not (isinstance(layers, list) and all(isinstance(e, str) for e in layers)):
            raise PydanticCustomError(
                "setting", "{text}", {"text": f"got {show(layers)}, allowed 5*sse, softmax or a list"}
            )
        try:
            expand_pattern(layers)
        except ValueError as error:
            raise PydanticCustomError("setting", "{text}", {"text": str(error)}) from None
        return layers

    @model_validator(mode="after")
    def _derive(self) -> "ModelConfig":
        if self.ffn_hidden_size is None:
            self.ffn_hidden_size = -(-8 * self.hidden_size // (3 * 64)) * 64
        if self.softmax.head_dim is None and self.softmax.num_heads and self.hidden_size % self.softmax.num_heads == 0:
            self.softmax.head_dim = self.hidden_size // self.softmax.num_heads
        return self

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding: vocab_size rounded up to a multiple of vocab_multiple."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

    def layer_kinds(self) -> list[str]:
        """The kind of every layer, first to last: sse, gla, gdn or softmax."""
        period = expand_pattern(self.layers)
        return period * (self.num_layers // len(period))

    def recurrences(self) -> set[Recurrence]:
        """The recurrences in use: that of the sse layers, and those of the gla and gdn layers."""
        kinds = set(self.layer_kinds())
        used: set[Recurrence] = {self.sse.recurrence} if "sse" in kinds else set()
        if "gla" in kinds:
            used.add("gla")
        if "gdn" in kinds:
            used.add("gdn")
        return used


class ParallelConfig(Section):
    tensor: Count = 1
    sequence: bool = False
    pipeline: Count = 1
    virtual_pipeline: Count = 1
    context: Count = 1
    layout: Literal["auto", "contiguous", "zigzag"] = "auto"
    hand_off: Literal["exscan", "allgather", "p2p", "two_level"] = "exscan"
    hand_off_wire: Literal["fp32", "bf16"] = "fp32"
    context_per_node: Count = 1
    data: Count | None = None
    distributed_optimizer: bool = False
    timeout_minutes: Positive = 30.0

    @property
    def replica_size(self) -> int:
        """Processes that work on the same sequences."""
        return self.tensor * self.pipeline * self.context


class DataConfig(Section):
    train: str
    validation: str | None = None
    corpus: Literal["python_stdlib"] | None = None
    sequence_length: Count
    reset_at_documents: bool = True


class TrainingConfig(Section):
    steps: Count
    global_batch_size: Count
    micro_batch_size: Count = 1
    precision: Literal["fp32", "bf16"] = "bf16"
    recompute: Literal["none", "full"] = "none"
    seed: Size0 = 1234
    validation_interval: Size0 = 0
    validation_batches: Count = 8
    max_skipped_steps: Count = 10


class OptimizerConfig(Section):
    learning_rate: Positive
    min_learning_rate: NonNegative = 0.0
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    warmup_steps: Size0 = 0
    decay_steps: Size0 = DERIVED
    weight_decay: NonNegative = 0.1
    beta1: Fraction = 0.9
    beta2: Fraction = 0.95
    epsilon: Positive = 1e-8
    clip_grad: Positive = 1.0


class CheckpointConfig(Section):
    resume: str = "auto"
    load_weights: str | None = None
    interval: Size0 = 0
    keep_last: Count | None = None
    asynchronous: bool = True
    verify: Literal["hashes", "sizes"] = "hashes"
    stop_after_minutes: Positive | None = None


class MonitorConfig(Section):
    folder: str
    log_interval: Count = 1
    tensorboard: bool = True
    health_interval: Count = 10


class RunConfig(Section):
    """A whole run. Checked: an instance holds no contradiction that can be known before the start."""

    model: ModelConfig
    parallel: ParallelConfig = Field(default_factory=ParallelConfig)
    data: DataConfig
    training: TrainingConfig
    optimizer: OptimizerConfig
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    monitor: MonitorConfig

    @model_validator(mode="after")
    def _check(self) -> "RunConfig":
        if self.optimizer.decay_steps is None:
            stay = max(0, self.training.steps - self.optimizer.warmup_steps)
            self.optimizer.decay_steps = min(self.training.steps // 5, stay) if self.optimizer.schedule == "wsd" else 0
        problem = find_problem(self)
        if problem is not None:
            raise PydanticCustomError("setting", "{key}: {text}", {"key": problem.key, "text": problem.text})
        return self

    def to_yaml(self) -> str:
        """The settings with all defaults filled in; loads to an equal RunConfig."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
