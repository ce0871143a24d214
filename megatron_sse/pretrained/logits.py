"""Logits of a model in a folder: ours by Megatron-Core's modules, others by their own code."""

import ctypes
import gc
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_sse.config import RunConfig
from megatron_sse.hf.exported.network_megatron_sse import Network
from megatron_sse.installed import require
from megatron_sse.model import build_model
from megatron_sse.parallel.device import Device, setup_device
from megatron_sse.parallel.groups import destroy_groups, init_groups, init_process_group
from megatron_sse.parallel.layout import TokenLayout
from megatron_sse.pretrained.open import HF, OURS, SSE, Model, make_run_config


def check_can_compute(model: Model) -> None:
    """Raise UserError where what computes the model's logits is not installed."""
    if model.kind not in (OURS, HF, SSE):
        require("transformers", f"logits of {model.folder} (a {model.kind} model)")


@torch.no_grad()
def compute_logits(model: Model, tokens_BL: Tensor) -> Tensor:
    """Logits [B, L, vocabulary], fp32 on the CPU, computed in fp32."""
    compute = {OURS: _by_megatron, HF: _by_network, SSE: _by_network}.get(model.kind, _by_transformers)
    logits = compute(model, tokens_BL)
    _free_memory()
    return logits[..., : model.config.model.vocab_size].float().cpu()


def _free_memory() -> None:
    """Give the memory of a model that is no longer needed back to the system, so that another one finds it."""
    # Models are reference cycles.
    gc.collect()
    # glibc keeps what was freed; other C libraries have no such call.
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _by_megatron(model: Model, tokens_BL: Tensor) -> Tensor:
    with single_process() as (groups, device):
        (chunk,) = build_model(_for_one_process(model.config, tokens_BL.shape[1]), groups, device, draw=False)
        for name, parameter in chunk.named_parameters():
            parameter.copy_(model.weights.get(name))
        chunk.eval()
        layout = TokenLayout.from_starts(np.zeros(tuple(tokens_BL.shape), dtype=bool), device=device.type)
        return chunk(tokens_BL.to(device.type), None, None, packed_seq_params=layout)


def _for_one_process(config: RunConfig, length: int) -> RunConfig:
    return make_run_config(config.model.model_dump(), length, "fp32", "model")


@contextmanager
def single_process() -> Iterator[tuple[ProcessGroupCollection, Device]]:
    """The groups of a run of this process alone."""
    device = setup_device(0)
    init_process_group(device)
    try:
        yield init_groups(), device
    finally:
        destroy_groups()
        dist.destroy_process_group()


def _by_network(model: Model, tokens_BL: Tensor) -> Tensor:
    """By the layers of the modeling file that exports have, which read the SSE authors' tensors too."""
    settings = network_settings(model.config)
    with torch.device("meta"):
        network = Network(settings)
    weights = {
        part.name.removeprefix("model."): model.weights.get(part.name).float()
        for link in model.links
        for part in link.theirs
    }
    output = weights.pop("lm_head.weight", weights["embeddings.weight"])
    network.load_state_dict(weights, assign=True)
    return network(network.embeddings(tokens_BL)) @ output.t()


def network_settings(config: RunConfig) -> dict[str, Any]:
    """The model's settings as Network takes them."""
    return config.model.model_dump(mode="json") | {"layers": config.model.layer_kinds()}


def _by_transformers(model: Model, tokens_BL: Tensor) -> Tensor:
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    network = transformers.AutoModelForCausalLM.from_pretrained(
        model.folder, dtype=torch.float32, local_files_only=True, attn_implementation="sdpa"
    )
    return network.eval()(tokens_BL, use_cache=False).logits
