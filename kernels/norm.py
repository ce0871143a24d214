"""What follows the banks: their outputs are summed, normalised per head and gated."""

import torch
from torch import Tensor
from torch.nn.functional import rms_norm, silu

from megatron_sse.kernels.backend import use_triton


def gated_norm(
    o_THV: Tensor, picked_TPHV: Tensor | None, weight_V: Tensor, gate_THV: Tensor | None, eps: float
) -> Tensor:
    """Return rms_norm(o + sum over P of picked) weight silu(gate), computed at least in fp32.

    Args:
        o_THV: the shared bank's output.
        picked_TPHV: what was read from the picked partitions; None where there is nothing to add.
        weight_V: one weight for all heads.
        gate_THV: the output gate before its activation; None for no gate.
        eps: added to the mean square.

    Returns:
        [T, H, V] in the gate's dtype, in o's where there is no gate.
    """
    if use_triton(o_THV):
        from megatron_sse.kernels.triton.norm import gated_norm as run

        return run(o_THV, picked_TPHV, weight_V, gate_THV, eps)
    dtype = torch.promote_types(o_THV.dtype, torch.float32)
    x_THV = o_THV.to(dtype)
    if picked_TPHV is not None:
        x_THV = x_THV + picked_TPHV.to(dtype).sum(1)
    x_THV = rms_norm(x_THV, weight_V.shape, weight_V.to(dtype), eps)
    if gate_THV is None:
        return x_THV.to(o_THV.dtype)
    return (x_THV * silu(gate_THV.to(dtype))).to(gate_THV.dtype)
