"""Initial weights that do not depend on the layout.

Every parameter is drawn in full, from a generator seeded by the run's seed and the parameter's name in the complete
model, and each rank keeps its part. Any tensor, pipeline and data parallelism starts from the same model.
"""

import hashlib
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_sse.config import ModelConfig
from megatron_sse.config.weights import Initial, Weight
from megatron_sse.errors import UserError
from megatron_sse.model.language_model import LanguageModel

# Fills the full tensor in place.
Draw = Callable[[Tensor, torch.Generator], object]


def bind_weights(chunk: LanguageModel, weights: Mapping[str, Weight], groups: ProcessGroupCollection) -> None:
    """Give each parameter of a model chunk its declaration, as the attribute `weight`.

    Raises UserError for a parameter that is not declared, which only a field of model.transformer can add.
    """
    bound = set()
    for name, parameter in chunk.named_parameters():
        name = global_name(name, chunk)
        if name not in weights:
            raise UserError(
                f"model.transformer: a field adds the parameter {name}, which this model does not support "
                "(config/weights.py declares those that it has)"
            )
        weight = weights[name]
        assert tuple(parameter.shape) == weight.local_shape(groups.tp.size()), (name, parameter.shape, weight)
        parameter.weight = weight
        bound.add(name)
    # A pipeline stage has the weights of its own layers alone.
    layers = tuple(f"decoder.layers.{layer.layer_number - 1}." for layer in chunk.decoder.layers)
    missing = {name for name in weights if name.startswith(layers)} - bound
    assert not missing, f"declared in config/weights.py but not built: {sorted(missing)}"


def initialize_weights(chunk: LanguageModel, groups: ProcessGroupCollection, model: ModelConfig, seed: int) -> None:
    """Draw all parameters of a model chunk in place."""
    with torch.no_grad():
        for parameter in chunk.parameters():
            full = draw_full(parameter.weight, model, seed, parameter.device)
            parameter.copy_(own_part(full, parameter, groups.tp.rank(), groups.tp.size()))


def draw_full(weight: Weight, model: ModelConfig, seed: int, device: torch.device | str = "cpu") -> Tensor:
    """Return the full initial tensor of a weight, fp32."""
    # Names that differ in one character give seeds that have nothing in common.
    digest = hashlib.sha256(f"{seed}/{weight.name}".encode()).digest()
    generator = torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "little"))
    full = torch.empty(weight.shape, dtype=torch.float32, device=device)
    _draw_for(weight.initial, model)(full, generator)
    return full


def global_name(name: str, chunk: LanguageModel) -> str:
    """Return the parameter's name in the complete model: with the layer's number there in place of that in the chunk.

    Tied output weights have the embedding's name.
    """
    if name == "output_layer.weight" and chunk.share_embeddings_and_output_weights:
        return "embedding.word_embeddings.weight"
    match = re.match(r"decoder\.layers\.(\d+)\.(.*)", name)
    if match is None:
        return name
    layer = chunk.decoder.layers[int(match[1])].layer_number - 1
    return f"decoder.layers.{layer}.{match[2]}"


def own_part(full: Tensor, parameter: Any, rank: int, size: int) -> Tensor:
    """Return a tensor rank's part of a full weight, by the attributes that Megatron-Core's modules set."""
    if not getattr(parameter, "tensor_model_parallel", False):
        return full
    # stride 2: gate and up projections follow each other and each is split. Rank 0 of 2 holds pieces 0 and 2 of 4.
    dim, stride = parameter.partition_dim, parameter.partition_stride
    pieces = full.chunk(size * stride, dim)
    return torch.cat(pieces[rank::size], dim)


def _draw_log_rate(full: Tensor, generator: torch.Generator) -> None:
    """Draw the log of uniform (0, 16], as the authors do but for the 0, whose log is -inf."""
    full.uniform_(0, 1, generator=generator)
    full.copy_((16 * (1 - full)).log())


def _draw_time_step_bias(full: Tensor, generator: torch.Generator) -> None:
    """Draw the inverse softplus of time steps spread evenly over log [0.001, 0.1]."""
    full.uniform_(math.log(0.001), math.log(0.1), generator=generator)
    step = full.exp()
    full.copy_(step + (-torch.expm1(-step)).log())


def _draw_convolution(full: Tensor, generator: torch.Generator) -> None:
    bound = full.shape[-1] ** -0.5
    full.uniform_(-bound, bound, generator=generator)


def _draw_for(initial: Initial, model: ModelConfig) -> Draw:
    def normal(std: float) -> Draw:
        return lambda full, generator: full.normal_(0, std, generator=generator)

    draws: dict[Initial, Draw] = {
        "normal": normal(model.init_std),
        "embedding": normal(model.embedding_init_std or model.init_std),
        # Megatron-Core's scaling of what is added to the residual stream.
        "residual": normal(model.init_std / math.sqrt(2 * model.num_layers)),
        "ones": lambda full, generator: full.fill_(1),
        "zeros": lambda full, generator: full.zero_(),
        "log_rate": _draw_log_rate,
        "time_step": _draw_time_step_bias,
        "convolution": _draw_convolution,
    }
    return draws[initial]
