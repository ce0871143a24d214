"""Which modules a model is built from: Transformer Engine's where it can run, plain ones elsewhere."""

import importlib.util
import logging
from dataclasses import dataclass

from megatron.core.extensions import transformer_engine as te
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

from megatron_sse.model.attention import DocumentArguments, TEAttention, TorchAttention
from megatron_sse.model.norm import RMSNorm
from megatron_sse.parallel.device import Device

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Backend:
    """The modules behind every spec, chosen once per run."""

    column_parallel_linear: type
    row_parallel_linear: type
    norm: type
    core_attention: type[TorchAttention] | type[DocumentArguments]
    fuse_gradient_accumulation: bool


def choose_backend(device: Device) -> Backend:
    """Choose by device and by what is installed, and log what was chosen and why."""
    # The package called apex on PyPI is another one: NVIDIA's is known by its extension modules.
    fuse = device.type == "cuda" and importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None
    if device.type == "cuda" and te.HAVE_TE:
        backend = Backend(te.TEColumnParallelLinear, te.TERowParallelLinear, te.TENorm, TEAttention, fuse)
        reason = "Transformer Engine"
    else:
        backend = Backend(ColumnParallelLinear, RowParallelLinear, RMSNorm, TorchAttention, fuse)
        reason = "plain torch (no GPU)" if device.type != "cuda" else "plain torch (Transformer Engine not installed)"
    apex = "NVIDIA Apex, fused" if fuse else "separate (NVIDIA Apex not installed or no GPU)"
    kernels = "Triton" if device.type == "cuda" else "torch, slow (no GPU)"
    logger.info("SSE layers: %s; linear layers, norms, attention: %s; weight gradients: %s", kernels, reason, apex)
    return backend
