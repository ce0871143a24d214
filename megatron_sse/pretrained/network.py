"""A model for generation, from any folder that holds one."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_sse.config import RunConfig
from megatron_sse.config.load import make_config
from megatron_sse.hf.links import to_ours
from megatron_sse.model import build_model
from megatron_sse.model.attention import TorchAttention
from megatron_sse.model.initialize import global_name, own_part
from megatron_sse.parallel.device import Device, setup_device
from megatron_sse.parallel.groups import destroy_groups, init_groups, init_process_group
from megatron_sse.pretrained.open import OURS, Model


def inference_config(model: Model, precision: str | None, tensor: int = 1) -> RunConfig:
    """Settings to build the model with: split over `tensor` ranks and in no other way, in its own precision unless
    another is given. Raises UserError where it cannot be split so."""
    values = model.config.model_dump()
    values["parallel"] = {"tensor": tensor}
    # One micro-batch on one data rank.
    values["training"] |= {"global_batch_size": 1, "micro_batch_size": 1, "recompute": "none"}
    values["training"]["precision"] = precision or values["training"]["precision"]
    return make_config(values, {"": str(model.folder)})


@torch.no_grad()
def build_and_load(model: Model, config: RunConfig, groups: ProcessGroupCollection, device: Device) -> GPTModel:
    """This tensor rank's part of the model, ready to generate."""
    # Keys and values that are kept are read by plain torch's attention.
    [chunk] = build_model(config, groups, device, draw=False, core_attention=TorchAttention)
    parameters = {global_name(name, chunk): parameter for name, parameter in chunk.named_parameters()}
    for name, whole in _tensors(model):
        parameter = parameters.pop(name)
        parameter.copy_(own_part(whole, parameter, groups.tp.rank(), groups.tp.size()))
    assert not parameters, parameters.keys()
    return chunk.eval()


def _tensors(model: Model) -> Iterable[tuple[str, Tensor]]:
    if model.kind == OURS:
        return ((link.ours, model.weights.get(link.ours)) for link in model.links)
    return to_ours(model.links, model.weights)


@contextmanager
def inference_groups(tensor: int, context: int = 1) -> Iterator[tuple[ProcessGroupCollection, Device]]:
    """All tensor x context processes in their groups, and the device of this one."""
    device = setup_device(int(os.environ.get("LOCAL_RANK", "0")))
    init_process_group(device)
    try:
        yield init_groups(tensor, context=context), device
    finally:
        destroy_groups()
        dist.destroy_process_group()
