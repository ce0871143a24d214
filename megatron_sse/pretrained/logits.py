"""Logits of a model in a folder: of ours by Megatron-Core's modules, of others by their own code."""

import ctypes
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import Module

from megatron_sse.config import RunConfig
from megatron_sse.hf.exported.network_megatron_sse import Network
from megatron_sse.hf.name_map import OUTPUT
from megatron_sse.installed import require
from megatron_sse.parallel.layout import TokenLayout
from megatron_sse.pretrained.lending import compute_in_fp32
from megatron_sse.pretrained.network import build_and_lend, inference_groups
from megatron_sse.pretrained.open import HF, OURS, SSE, Model, make_run_config


def check_can_compute(model: Model) -> None:
    """Raise UserError where what computes the model's logits is not installed."""
    if model.kind not in (OURS, HF, SSE):
        require("transformers", f"logits of {model.folder} (a {model.kind} model)")


@torch.no_grad()
def compute_logits(model: Model, tokens_BL: Tensor) -> Tensor:
    """Compute logits [B, L, vocabulary] in fp32; they are returned on the CPU."""
    compute = {OURS: _by_megatron, HF: _by_network, SSE: _by_network}.get(model.kind, _by_transformers)
    logits = compute(model, tokens_BL)
    # glibc keeps what was freed, for the next model; other C libraries have no such call.
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    return logits[..., : model.config.model.vocab_size].float().cpu()


def _drop_weights(network: Module) -> None:
    """Free a network's weights at once: networks are reference cycles, which Python frees at some later time."""
    for parameter in network.parameters():
        parameter.data = parameter.data.new_empty(0)


def _by_megatron(model: Model, tokens_BL: Tensor) -> Tensor:
    config = make_run_config(model.config.model.model_dump(), tokens_BL.shape[1], "fp32", "model")
    with inference_groups() as (groups, device):
        network = build_and_lend(model, config, groups, device)
        layout = TokenLayout.from_starts(np.zeros(tuple(tokens_BL.shape), dtype=bool), device=device.type)
        logits = network(tokens_BL.to(device.type), None, None, packed_seq_params=layout)
        _drop_weights(network)
        return logits


def _by_network(model: Model, tokens_BL: Tensor) -> Tensor:
    """Compute logits with the layers of the modeling file of exports, which also read the SSE authors' tensors."""
    settings = network_settings(model.config)
    with torch.device("meta"):
        network = Network(settings)
    weights = {
        part.name.removeprefix("model."): model.weights.get(part.name).float()
        for link in model.links
        for part in link.theirs
    }
    output = weights.pop(OUTPUT, weights["embeddings.weight"])
    network.load_state_dict(weights, assign=True)
    logits = network(network.embeddings(tokens_BL)) @ output.t()
    _drop_weights(network)
    return logits


def network_settings(config: RunConfig) -> dict[str, Any]:
    """Return the model's settings as Network takes them."""
    return config.model.model_dump(mode="json") | {"layers": config.model.layer_kinds()}


def _by_transformers(model: Model, tokens_BL: Tensor) -> Tensor:
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    # Weights of one type are kept as they are; others are fp32 from the start.
    stored = {model.weights.dtype(name) for name in model.weights.keys()}
    dtype = stored.pop() if len(stored) == 1 else torch.float32
    network = transformers.AutoModelForCausalLM.from_pretrained(
        model.folder, dtype=dtype, local_files_only=True, attn_implementation="sdpa"
    )
    compute_in_fp32(network)
    logits = network.eval()(tokens_BL, use_cache=False).logits
    _drop_weights(network)
    return logits
