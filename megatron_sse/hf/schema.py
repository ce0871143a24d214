"""The types and ranges that config.json of a Hugging Face folder must have, before anything is computed with them."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

# Far above any model, so that a wrong file is refused before memory is asked for.
_Size = Annotated[int, Field(ge=1, le=1 << 24)]
_Layers = Annotated[int, Field(ge=1, le=10_000)]
_Share = Annotated[float, Field(ge=0, le=1e6)]
_Positive = Annotated[float, Field(gt=0, le=1e12)]


class _Values(BaseModel):
    """Other keys are allowed, and not looked at."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)


class _Rope(_Values):
    rope_type: str | None = None
    type: str | None = None
    rope_theta: _Positive | None = None
    factor: _Positive | None = None
    low_freq_factor: _Positive | None = None
    high_freq_factor: _Positive | None = None
    original_max_position_embeddings: _Size | None = None


class DenseSchema(_Values):
    """Llama, Qwen2, Qwen3 and Mistral."""

    num_hidden_layers: _Layers
    hidden_size: _Size
    intermediate_size: _Size
    vocab_size: _Size
    num_attention_heads: _Size
    num_key_value_heads: _Size | None = None
    head_dim: _Size | None = None
    sliding_window: _Size | None = None
    use_sliding_window: bool | None = None
    max_window_layers: Annotated[int, Field(ge=0)] | None = None
    layer_types: Annotated[list[str], Field(min_length=1)] | None = None
    rms_norm_eps: _Positive
    initializer_range: _Positive
    tie_word_embeddings: bool
    attention_dropout: _Share | None = None
    rope_theta: _Positive | None = None
    rope_scaling: _Rope | None = None
    rope_parameters: _Rope | None = None


class _Attention(_Values):
    layers: list[int] = []
    num_heads: _Size
    num_kv_heads: _Size | None = None
    window_size: _Size | None = None
    rope_theta: _Positive | None = None
    qkv_bias: bool = False


class SSESchema(_Values):
    """The SSE authors' layout."""

    hidden_size: _Size
    expand_v: _Positive
    use_output_gate: bool
    use_short_conv: bool
    allow_neg_eigval: bool
    conv_size: _Size
    head_dim: _Size
    num_heads: _Size
    num_v_heads: _Size | None
    num_sparse_partition: Annotated[int, Field(ge=0, le=1 << 24)]
    num_writer: _Size
    num_reader: _Size
    sse_implementation: str
    aux_loss_coef: _Share
    hidden_ratio: _Positive | None
    intermediate_size: _Size | None
    num_hidden_layers: _Layers
    norm_eps: _Positive
    attn: _Attention | None
    tie_word_embeddings: bool
    initializer_range: _Positive
    vocab_size: _Size
    linear_attn_type: str


class _Heads(_Values):
    num_heads: _Size | None
    head_dim: _Size | None


class _SSEHeads(_Heads):
    num_value_heads: _Size | None


class _SoftmaxHeads(_Heads):
    num_kv_heads: _Size | None


class OwnSchema(_Values):
    """Folders with our modeling file. The settings themselves are checked as those of a run."""

    class Model(_Values):
        layers: Annotated[list[str], Field(min_length=1, max_length=10_000)]
        sse: _SSEHeads
        softmax: _SoftmaxHeads

    model: Model


class FolderSchema(_Values):
    """What all of them have."""

    model_type: str
    max_position_embeddings: Any = None
