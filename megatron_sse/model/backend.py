"""Which modules a model is built from: Transformer Engine's where it can run, plain ones elsewhere."""

import copy
import importlib.util
import logging
from dataclasses import dataclass, replace
from typing import Any

from megatron.core.extensions import transformer_engine as te
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn import Module

from megatron_sse.config import RunConfig, attends_over_context, attention_kind
from megatron_sse.model.attention import DocumentArguments, TEAttention, TorchAttention
from megatron_sse.model.linear import ColumnLinear, RowLinear
from megatron_sse.model.norm import RMSNorm
from megatron_sse.parallel.device import Device
from megatron_sse.parallel.groups import this_rank

logger = logging.getLogger(__name__)

HOPPER, CONSUMER_BLACKWELL = (9, 0), (12, 0)


@dataclass(frozen=True)
class Installed:
    """What this machine can import of the fast modules for GPUs."""

    transformer_engine: bool
    apex: bool
    flash_attention: bool


def find_installed() -> Installed:
    """Look for the fast modules for GPUs."""
    # The package called apex on PyPI is another one: NVIDIA's is known by its extension modules.
    apex, flash = (importlib.util.find_spec(name) for name in ("fused_weight_gradient_mlp_cuda", "flash_attn"))
    return Installed(te.HAVE_TE, apex is not None, flash is not None)


class FusedGradients:
    """Accumulation of weight gradients inside the matrix product: goes in front of Transformer Engine's linear layers.

    They do it themselves. Megatron-Core's own linear layers, such as the output layer, need Apex for it, and both read
    the same setting.
    """

    def __init__(self, *args: Any, config: TransformerConfig, **kwargs: Any):
        config = copy.copy(config)
        config.gradient_accumulation_fusion = True
        super().__init__(*args, config=config, **kwargs)  # type: ignore[call-arg]


class TEColumnLinear(FusedGradients, te.TEColumnParallelLinear if te.HAVE_TE else Module):  # type: ignore[misc]
    """Transformer Engine's linear layer with its outputs split over the tensor group."""


class TERowLinear(FusedGradients, te.TERowParallelLinear if te.HAVE_TE else Module):  # type: ignore[misc]
    """Transformer Engine's linear layer with its inputs split over the tensor group."""


@dataclass(frozen=True)
class Backend:
    """The modules behind every spec, chosen once per run.

    fuse_gradient_accumulation: whether Megatron-Core's own linear layers accumulate with Apex.
    """

    column_parallel_linear: type
    row_parallel_linear: type
    norm: type
    core_attention: type[TorchAttention] | type[DocumentArguments]
    fuse_gradient_accumulation: bool


def choose_backend(device: Device) -> Backend:
    """Choose by device and by what is installed, and log what was chosen and why."""
    on_gpu, installed = device.type == "cuda", find_installed()
    fuse = on_gpu and installed.apex
    if on_gpu and installed.transformer_engine:
        backend = Backend(TEColumnLinear, TERowLinear, te.TENorm, TEAttention, fuse)
    else:
        backend = Backend(ColumnLinear, RowLinear, RMSNorm, TorchAttention, fuse)
    kernels = "Triton" if on_gpu else "torch, slow (no GPU)"
    plain = f"plain torch ({'Transformer Engine not installed' if on_gpu else 'no GPU'})"
    modules = "Transformer Engine" if on_gpu and installed.transformer_engine else plain
    gradients = describe_weight_gradients(installed) if on_gpu else "separate (no GPU)"
    logger.info("SSE layers: %s; linear layers, norms: %s; weight gradients: %s", kernels, modules, gradients)
    return backend


def describe_weight_gradients(installed: Installed) -> str:
    """Describe how weight gradients are accumulated on a GPU."""
    if installed.transformer_engine and installed.apex:
        return "fused (Transformer Engine; output layer: NVIDIA Apex)"
    if installed.transformer_engine:
        return "fused (Transformer Engine), of the output layer separate (NVIDIA Apex not installed)"
    if installed.apex:
        return "fused (NVIDIA Apex)"
    return "separate (neither Transformer Engine nor NVIDIA Apex installed)"


def choose_attention(backend: Backend, config: RunConfig, device: Device) -> Backend:
    """Return the backend, with plain torch's attention where its own cannot attend in this run; log which and why."""
    if "softmax" not in config.model.layer_kinds():
        return backend
    if not backend.core_attention.wants_zigzag:
        if config.model.transformer.get("cp_comm_type") is not None and this_rank() == 0:
            logger.warning("model.transformer.cp_comm_type is ignored: Transformer Engine is not in use")
        logger.info("attention: plain torch")
        return backend
    obstacle = attention_obstacle(config, device.capability(), find_installed().flash_attention)
    if obstacle is not None:
        logger.info("attention: plain torch (%s)", obstacle)
        return replace(backend, core_attention=TorchAttention)
    over = f" over context ranks ({attention_kind(config)})" if attends_over_context(config) else ""
    logger.info("attention%s: Transformer Engine", over)
    return backend


def attention_obstacle(config: RunConfig, capability: tuple[int, int], flash_attention: bool) -> str | None:
    """Return what keeps Transformer Engine's attention from this run's softmax layers on a GPU, or None.

    capability: of the GPU. Its fused attention for packed documents is cuDNN's, which needs Hopper or newer, or
    flash-attn's, which takes no padding between the documents. Where neither can, what is left materialises the scores.
    """
    if config.rl is not None and config.rl.share_prefixes:
        return "Transformer Engine has none for prompts that answers share, rl.share_prefixes"
    over_context = attends_over_context(config)
    if over_context and attention_kind(config) is None:
        return "Transformer Engine has none over context ranks for these settings"
    if not config.data.reset_at_documents or HOPPER <= capability < CONSUMER_BLACKWELL:
        return None
    why = f"cuDNN has none for packed documents on sm_{capability[0]}{capability[1]}"
    if over_context:
        return f"{why}, and flash-attn none for their padding on context ranks"
    return None if flash_attention else f"{why}, and flash-attn is not installed"
