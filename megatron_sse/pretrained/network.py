"""The network of a model in a folder, built on the processes that share it."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor
from torch.nn import Parameter

from megatron_sse.config import RunConfig
from megatron_sse.config.load import make_config
from megatron_sse.model import build_model
from megatron_sse.model.attention import TorchAttention
from megatron_sse.model.initialize import global_name, own_part
from megatron_sse.model.language_model import LanguageModel
from megatron_sse.parallel.device import Device, setup_device
from megatron_sse.parallel.groups import destroy_groups, init_groups, init_process_group
from megatron_sse.pretrained.lending import lend_weights
from megatron_sse.pretrained.open import Model


def inference_config(model: Model, precision: str | None, tensor: int = 1) -> RunConfig:
    """Return the settings to build the model with: split over `tensor` ranks and in no other way, in its own precision
    unless another is given. Raises UserError where it cannot be split so."""
    values = model.config.model_dump()
    # Every rank computes all tokens: a step of generation has one for each sequence.
    values["parallel"] = {"tensor": tensor, "sequence": False}
    # One micro-batch on one data rank; with rl the batch follows from its prompts.
    batch = 1 if model.config.rl is None else None
    values["training"] |= {"global_batch_size": batch, "micro_batch_size": 1, "recompute": "none"}
    values["training"]["precision"] = precision or values["training"]["precision"]
    return make_config(values, {"": str(model.folder)})


@torch.no_grad()
def build_and_load(
    model: Model,
    config: RunConfig,
    groups: ProcessGroupCollection,
    device: Device,
    core_attention: type[TorchAttention] | None = TorchAttention,
) -> LanguageModel:
    """Build this tensor rank's part of the model, with its weights, ready to generate.

    core_attention: by default plain torch's, which reads keys and values that are kept; None for the backend's.
    """
    [chunk] = build_model(config, groups, device, draw=False, core_attention=core_attention)
    parameters = {global_name(name, chunk): parameter for name, parameter in chunk.named_parameters()}
    rank, size = groups.tp.rank(), groups.tp.size()
    for name, full in model.tensors():
        parameter = parameters.pop(name)
        parameter.copy_(own_part(full, parameter, rank, size))
    assert not parameters, parameters.keys()
    return chunk.eval()


@torch.no_grad()
def build_and_lend(model: Model, config: RunConfig, groups: ProcessGroupCollection, device: Device) -> LanguageModel:
    """Build a model of our checkpoint on one tensor rank, for one forward pass with the backend's attention.

    Each layer reads its weights when it needs them, and has none before and after.
    """
    [chunk] = build_model(config, groups, device, draw=False, core_attention=None)
    in_layers = set(chunk.decoder.layers.parameters())
    for name, parameter in chunk.named_parameters():
        if parameter not in in_layers:
            parameter.copy_(model.weights.get(global_name(name, chunk)))
    for layer in chunk.decoder.layers:
        values: dict[Parameter, Callable[[], Tensor]] = {}
        for name, parameter in layer.named_parameters():
            parameter.data = parameter.data.new_empty(0)
            full = f"decoder.layers.{layer.layer_number - 1}.{name}"
            values[parameter] = partial(_read, model, full, parameter.dtype, parameter.device)
        lend_weights(layer, values)
    return chunk.eval()


def _read(model: Model, name: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    return model.weights.get(name).to(device, dtype)


@contextmanager
def inference_groups(tensor: int = 1, context: int = 1) -> Iterator[tuple[ProcessGroupCollection, Device]]:
    """Set up the groups of all tensor x context processes, and the device of this one, for a block."""
    device = setup_device(int(os.environ.get("LOCAL_RANK", "0")), tensor)
    init_process_group(device)
    try:
        yield init_groups(tensor, context=context), device
    finally:
        destroy_groups()
        dist.destroy_process_group()
