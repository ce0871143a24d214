"""The settings of a run, section by section; configs/reference.yaml documents each key."""

from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BeforeValidator,
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)
from pydantic_core import PydanticCustomError

from megatron_sse.config.distill import DistillConfig
from megatron_sse.config.pattern import expand_pattern
from megatron_sse.config.problem import show
from megatron_sse.config.rl import RLConfig
from megatron_sse.config.section import (
    DERIVED,
    Count,
    Fraction,
    Layers,
    Length,
    Minutes,
    Name,
    NonNegative,
    Positive,
    Rate,
    Rate0,
    Section,
    Seed,
    Size0,
    Steps,
    Steps0,
    Tokens,
)
from megatron_sse.recurrence import RECURRENCES, Recurrence, RecurrenceName

KeyMap = Literal["softmax", "silu", "topk_softmax", "one_minus_decay"]
Schedule = Literal["cosine", "wsd", "constant"]
NeedleVariant = Literal["single", "multi_key", "multi_value", "multi_query"]


class SSEConfig(Section):
    """Settings of sse layers, and of layers named after a recurrence: the same layer without partitions."""

    recurrence: RecurrenceName = "gla"
    num_heads: Count = DERIVED
    head_dim: Count = DERIVED
    value_head_dim: Count = DERIVED
    num_value_heads: Count = DERIVED
    num_partitions: Size0 = 4
    num_writers: Count = 1
    num_readers: Count = 1
    own_read_router: bool = False
    form: Literal["varlen", "mask"] = "varlen"
    weight_writes: bool = True
    weight_reads: bool = True
    weight_scale: Positive = 1.0
    gate: Literal["post_norm", "beta", "reference"] = "post_norm"
    shared_bank: bool = True
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

    @property
    def num_routers(self) -> int:
        """Routers of an sse layer: one for writes and reads, or one each."""
        return 1 + self.own_read_router

    @property
    def num_picks(self) -> int:
        """Partitions that a token writes to or reads, counted twice where two routers pick them."""
        return self.num_writers + self.num_readers if self.own_read_router else max(self.num_writers, self.num_readers)


class RotaryScaling(Section):
    """Rotary frequencies of models whose context was extended.

    All are divided by `factor`; where the length that the model was made for is given, only those that turn few times
    in it (Llama 3)."""

    factor: Annotated[float, Field(ge=1)]
    original_length: Length | None = None
    low_turns: Positive = 1.0
    high_turns: Positive = 4.0


class SoftmaxConfig(Section):
    """Settings of softmax layers."""

    num_heads: Count = DERIVED
    head_dim: Count = DERIVED
    num_kv_heads: Count = DERIVED
    window: Length | None = None
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
    num_layers: Layers
    hidden_size: Count
    ffn_hidden_size: Count = DERIVED
    vocab_size: Count
    vocab_multiple: Count = 128
    layers: str | list[str]
    norm_epsilon: Positive = 1e-5
    init_std: Positive = 0.02
    embedding_init_std: Positive | None = None
    tie_embeddings: bool = False
    input_convolution: Size0 = 0
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
            # SwiGLU has three matrices: 8/3 of the hidden size costs what two of 4 times would; rounded up to 64.
            self.ffn_hidden_size = -(-8 * self.hidden_size // (3 * 64)) * 64
        if self.softmax.head_dim is None and self.softmax.num_heads and self.hidden_size % self.softmax.num_heads == 0:
            self.softmax.head_dim = self.hidden_size // self.softmax.num_heads
        return self

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding: vocab_size rounded up to a multiple of vocab_multiple."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

    def layer_kinds(self) -> list[str]:
        """Return the kind of every layer, first to last: one of pattern.LAYER_KINDS."""
        period = expand_pattern(self.layers)
        return period * (self.num_layers // len(period))

    def recurrences(self) -> set[Recurrence]:
        """Return the recurrences in use: that of the sse layers, and those that layers are named after."""
        names = {self.sse.recurrence if kind == "sse" else kind for kind in self.layer_kinds()}
        return {row for name, row in RECURRENCES.items() if name in names}


class ParallelConfig(Section):
    tensor: Count = 1
    sequence: bool = DERIVED
    pipeline: Count = 1
    virtual_pipeline: Count = 1
    context: Count = 1
    layout: Literal["auto", "contiguous", "zigzag"] = "auto"
    # "auto": config/context.py, choose_hand_off.
    hand_off: Literal["auto", "exscan", "allgather", "p2p", "two_level"] = "auto"
    hand_off_wire: Literal["fp32", "bf16"] = "fp32"
    # None: those that fit on a machine.
    context_per_node: Count | None = None
    data: Count | None = None
    distributed_optimizer: bool = False
    # None: on GPUs.
    overlap_gradients: bool | None = None
    overlap_parameters: bool | None = None
    timeout_minutes: Minutes = 30.0
    max_restarts: Size0 = 0

    @model_validator(mode="after")
    def _derive(self) -> "ParallelConfig":
        if self.sequence is None:
            self.sequence = self.tensor > 1
        return self

    @property
    def replica_size(self) -> int:
        """Processes that work on the same sequences."""
        return self.tensor * self.pipeline * self.context


class MQARTask(Section):
    """Multi-query associative recall: `pairs` of keys and values, and later every key again, which asks for its value.

    keys, values: how many different ones there are.
    """

    pairs: Count
    keys: Count
    values: Count


class NeedleTask(Section):
    """Named numbers of `digits` digits, hidden in a text of byte tokens that ends by asking for them."""

    variant: NeedleVariant = "single"
    digits: Count = 7


class Source(Section):
    """A part of a blend: a token file, or a task whose samples are made from a seed.

    weight: its share of the samples, relative to the other sources' weights."""

    prefix: Name | None = None
    mqar: MQARTask | None = None
    needle: NeedleTask | None = None
    weight: Positive = 1.0

    @model_validator(mode="after")
    def _check_kind(self) -> "Source":
        given = [name for name in SOURCES if getattr(self, name) is not None]
        if len(given) != 1:
            text = f"got {' and '.join(given) or 'none of them'}, allowed one of {', '.join(SOURCES)}"
            raise PydanticCustomError("setting", "{text}", {"text": text})
        return self

    @model_serializer(mode="wrap")
    def _leave_out_null(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out the other kinds of sources, which are null."""
        return {name: value for name, value in write(self).items() if value is not None}

    @property
    def task(self) -> MQARTask | NeedleTask | None:
        return self.mqar or self.needle

    def __str__(self) -> str:
        return self.prefix or next(name for name in SOURCES if getattr(self, name) is not None)


SOURCES = ("prefix", "mqar", "needle")


def _as_blend(value: Any) -> Any:
    """Return a list of sources; a file's prefix or one source alone becomes a blend of one."""
    if isinstance(value, str):
        return [{"prefix": value}]
    if isinstance(value, dict):
        return [value]
    if value is not None and not (isinstance(value, list) and value):
        text = f"got {show(value)}, allowed a prefix or a list of {{prefix: ..., weight: ...}}"
        raise PydanticCustomError("setting", "{text}", {"text": text})
    return value


Blend = Annotated[list[Source], BeforeValidator(_as_blend)]
# The default, written to a run's folder, is an empty list.
BlendOrNone = Annotated[list[Source], BeforeValidator(lambda value: value if value == [] else _as_blend(value))]


class DataConfig(Section):
    # Required unless rl gives prompts.
    train: BlendOrNone = Field(default_factory=list)
    validation: Blend | None = None
    validation_share: Fraction = 0.0
    corpus: Literal["python_stdlib"] | None = None
    sequence_length: Length = DERIVED
    packing: Literal["in_order", "best_fit"] = "in_order"
    long_documents: Literal["continue", "cut"] = "continue"
    reset_at_documents: bool = True

    def sources(self) -> list[Source]:
        """Return the sources of training, then those of validation."""
        return [*self.train, *(self.validation or [])]


class Stage(Section):
    """A part of a run at its own sequence length. Keys that are null keep the value of the other sections."""

    tokens: Tokens
    sequence_length: Length
    train: Blend | None = None
    global_batch_size: Count | None = None
    micro_batch_size: Count | None = None
    rotary_base: Positive | None = None
    learning_rate: Rate | None = None
    min_learning_rate: Rate0 | None = None
    schedule: Schedule | None = None
    warmup_steps: Steps0 | None = None
    decay_steps: Steps0 | None = None


RECOMPUTED_PARTS = ("mixer", "mlp")


def _check_recompute(value: Any) -> Any:
    if value in ("none", "full", *RECOMPUTED_PARTS):
        return value
    if isinstance(value, list) and value and all(part in RECOMPUTED_PARTS for part in value):
        if len(set(value)) == len(value):
            return value
    text = f"got {show(value)}, allowed none, full, one of {', '.join(RECOMPUTED_PARTS)}, or a list of these"
    raise PydanticCustomError("setting", "{text}", {"text": text})


# none, full, a part of a layer, or several.
Recompute = Annotated[str | list[str], BeforeValidator(_check_recompute)]


class TrainingConfig(Section):
    steps: Steps = DERIVED
    global_batch_size: Count = DERIVED
    micro_batch_size: Count = 1
    precision: Literal["fp32", "bf16"] = "bf16"
    recompute: Recompute = "none"
    # None: chosen by choose_loss_chunk.
    loss_chunk: Count | None = None
    # None: on GPUs.
    fused_loss: bool | None = None
    fused_swiglu: bool | None = None
    seed: Seed = 1234
    validation_interval: Steps0 = 0
    validation_batches: Count = 8
    max_skipped_steps: Steps = 10
    distill: DistillConfig | None = None


class OptimizerConfig(Section):
    learning_rate: Rate
    min_learning_rate: Rate0 = 0.0
    schedule: Schedule = "cosine"
    warmup_steps: Steps0 = 0
    decay_steps: Steps0 = DERIVED
    weight_decay: NonNegative = 0.1
    beta1: Fraction = 0.9
    beta2: Fraction = 0.95
    epsilon: Positive = 1e-8
    clip_grad: Positive = 1.0

    def default_decay_steps(self, num_steps: int) -> int:
        """Return the number of decaying steps at the end of a wsd schedule: a fifth of the steps without warm-up."""
        stay = max(0, num_steps - self.warmup_steps)
        return min(num_steps // 5, stay) if self.schedule == "wsd" else 0


class CheckpointConfig(Section):
    resume: Name = "auto"
    load_weights: Name | None = None
    interval: Steps0 = 0
    keep_last: Count | None = None
    asynchronous: bool = True
    verify: Literal["hashes", "sizes"] = "hashes"
    changed_data: Literal["refuse", "accept"] = "refuse"
    stop_after_minutes: Minutes | None = None


def _check_window(value: Any) -> Any:
    if isinstance(value, list) and len(value) == 2 and all(type(step) is int for step in value):
        if 1 <= value[0] <= value[1] <= 1_000_000_000:
            return value
    text = f"got {show(value)}, allowed the first and the last of some steps, such as [10, 12]"
    raise PydanticCustomError("setting", "{text}", {"text": text})


Window = Annotated[list[int], BeforeValidator(_check_window)]


class MonitorConfig(Section):
    folder: Name
    log_interval: Steps = 1
    tensorboard: bool = True
    wandb: Name | None = None
    mlflow: Name | None = None
    health_interval: Steps = 10
    spike_factor: NonNegative = 10.0
    straggler_factor: NonNegative = 1.3
    replica_check: Size0 = 100
    profile_steps: Window | None = None
    memory_steps: Window | None = None
    profile_ranks: list[Size0] = Field(default_factory=lambda: [0])


class Settings(Section):
    """All sections of a run, each valid by itself. RunConfig (run.py) is what also fits together."""

    model: ModelConfig
    parallel: ParallelConfig = Field(default_factory=ParallelConfig)
    data: DataConfig
    training: TrainingConfig
    optimizer: OptimizerConfig
    stages: list[Stage] | None = None
    rl: RLConfig | None = None
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    monitor: MonitorConfig

    def to_yaml(self) -> str:
        """Return the settings as YAML with all defaults filled in; it loads to an equal object."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
