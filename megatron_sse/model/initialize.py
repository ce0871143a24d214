"""Initial weights that do not depend on the layout.

Every parameter is drawn whole, from a generator seeded by the run's seed and the parameter's name in the whole model,
and each rank keeps its part. Any tensor, pipeline and data parallelism starts from the same model.
"""

import hashlib
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

_EMBEDDING = "embedding.word_embeddings.weight"

# Fills the whole tensor in place.
Draw = Callable[[Tensor, torch.Generator], object]


def initialize_weights(chunk: GPTModel, groups: ProcessGroupCollection, seed: int) -> None:
    """Draw all parameters of a model chunk in place."""
    with torch.no_grad():
        for name, parameter in chunk.named_parameters():
            name, shape = global_name(name, chunk), _whole_shape(parameter, groups)
            config = chunk.config
            std = config.embedding_init_method_std if name == _EMBEDDING else config.init_method_std
            whole = draw_whole(name, shape, seed, std, config.num_layers, parameter.device)
            parameter.copy_(own_part(whole, parameter, groups.tp.rank(), groups.tp.size()))


def draw_whole(
    name: str, shape: Sequence[int], seed: int, std: float, num_layers: int, device: torch.device | str = "cpu"
) -> Tensor:
    """A whole initial weight, fp32. name: in the whole model; std, num_layers: of the model."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "little"))
    whole = torch.empty(shape, dtype=torch.float32, device=device)
    _draw_for(name, std, num_layers)(whole, generator)
    return whole


def global_name(name: str, chunk: GPTModel) -> str:
    """The parameter's name with its layer's number in the whole model in place of that in the chunk; tied output
    weights have the embedding's."""
    if name == "output_layer.weight" and chunk.share_embeddings_and_output_weights:
        return _EMBEDDING
    match = re.match(r"decoder\.layers\.(\d+)\.(.*)", name)
    if match is None:
        return name
    layer = chunk.decoder.layers[int(match[1])].layer_number - 1
    return f"decoder.layers.{layer}.{match[2]}"


def own_part(whole: Tensor, parameter: Any, rank: int, size: int) -> Tensor:
    """A tensor rank's part of a whole weight, by the attributes that Megatron-Core's modules set."""
    if not getattr(parameter, "tensor_model_parallel", False):
        return whole
    # stride 2: gate and up projections stand one after the other, and each is split.
    dim, stride = parameter.partition_dim, parameter.partition_stride
    pieces = whole.chunk(size * stride, dim)
    return torch.cat(pieces[rank::size], dim)


def _whole_shape(parameter: Any, groups: ProcessGroupCollection) -> list[int]:
    shape = list(parameter.shape)
    if getattr(parameter, "tensor_model_parallel", False):
        shape[parameter.partition_dim] *= groups.tp.size()
    return shape


def _draw_for(name: str, std: float, num_layers: int) -> Draw:
    leaf = name.rsplit(".", 1)[-1]
    if leaf in _SPECIAL:
        return _SPECIAL[leaf]
    if leaf == "bias" or leaf == "layer_norm_bias":
        return lambda whole, generator: whole.zero_()
    if "norm" in name.rsplit(".", 2)[-2] or leaf in ("norm_weight", "layer_norm_weight"):
        return lambda whole, generator: whole.fill_(1)
    if any(part in name for part in (".out_proj.", ".linear_proj.", ".linear_fc2.")):
        # Megatron-Core's scaling of what is added to the residual stream.
        std /= math.sqrt(2 * num_layers)
    return lambda whole, generator: whole.normal_(0, std, generator=generator)


def _draw_log_rate(whole: Tensor, generator: torch.Generator) -> None:
    """log of uniform (0, 16], as the authors draw it but for the 0, whose log is -inf."""
    whole.uniform_(0, 1, generator=generator)
    whole.copy_((16 * (1 - whole)).log())


def _draw_time_step_bias(whole: Tensor, generator: torch.Generator) -> None:
    """Inverse softplus of time steps spread evenly over log [0.001, 0.1]."""
    whole.uniform_(math.log(0.001), math.log(0.1), generator=generator)
    step = whole.exp()
    whole.copy_(step + (-torch.expm1(-step)).log())


def _draw_convolution(whole: Tensor, generator: torch.Generator) -> None:
    bound = whole.shape[-1] ** -0.5
    whole.uniform_(-bound, bound, generator=generator)


_SPECIAL: dict[str, Draw] = {
    "A_log": _draw_log_rate,
    "dt_bias": _draw_time_step_bias,
    "conv_weight": _draw_convolution,
}
