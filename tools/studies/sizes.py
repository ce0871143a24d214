"""Numbers of parameters and of state elements by which the arms of a study are matched."""

from __future__ import annotations

from pathlib import Path

from megatron_sse.config import ModelConfig, RunConfig, load_config
from megatron_sse.config.derive import count_parameters
from megatron_sse.errors import UserError

# Relative difference up to which numbers of parameters count as equal.
TOLERANCE = 0.02


def match_parameters(path: Path, settings: list[str], wanted: int) -> list[str]:
    """Return the settings with the width of the MLP that makes the number of parameters `wanted`."""
    # The number of parameters is linear in the width, so two widths determine the one that is needed.
    one, two = (
        num_parameters(load_config(path, [*settings, f"model.ffn_hidden_size={width}"]).model) for width in (1, 2)
    )
    return [*settings, f"model.ffn_hidden_size={max(1, 1 + round((wanted - one) / (two - one)))}"]


def check_parameters(name: str, path: Path, settings: list[str], wanted: int) -> list[str]:
    """Return the settings of an arm. Raises UserError where it has not the wanted number of parameters."""
    if abs(num_parameters(load_config(path, settings).model) / wanted - 1) > TOLERANCE:
        raise UserError(f"--arms: {name} cannot have {wanted:,} parameters; give {path} a model with a wider MLP")
    return settings


def num_parameters(model: ModelConfig) -> int:
    """Return the number of parameters of the model."""
    return sum(count_parameters(model).values())


def state_elements(config: RunConfig) -> int:
    """Return how many numbers all layers keep of a sequence: states of all banks, or keys and values of all tokens."""
    model, sse, softmax = config.model, config.model.sse, config.model.softmax
    total = 0
    for kind in model.layer_kinds():
        if kind == "softmax":
            total += 2 * softmax.num_kv_heads * softmax.head_dim * (softmax.window or config.data.sequence_length)
        else:
            banks = sse.shared_bank + sse.num_partitions if kind == "sse" and sse.num_partitions else 1
            total += banks * sse.num_value_heads * sse.head_dim * sse.value_head_dim
    return total
