"""Norm and scaling of many tensors at once, where Transformer Engine's or Apex's kernels are not there or cannot run.

Megatron-Core's own loops over the tensors read each norm on the host: a wait for the GPU for every parameter and step.
The kernels run on GPUs alone, and Megatron-Core takes them where they are installed, also in a run on the CPU.
"""

from collections.abc import Sequence

import torch
from megatron.core.optimizer import clip_grads, optimizer
from megatron.core.utils import local_multi_tensor_l2_norm, local_multi_tensor_scale
from torch import Tensor


def replace_loops(on_gpu: bool) -> None:
    """Let Megatron-Core call this file's functions where it would call its loops, and on the CPU in any case."""
    if clip_grads.l2_norm_impl is local_multi_tensor_l2_norm or not on_gpu:
        clip_grads.l2_norm_impl = l2_norm
    for module in (clip_grads, optimizer):
        if module.multi_tensor_scale_impl is local_multi_tensor_scale or not on_gpu:
            module.multi_tensor_scale_impl = scale


def l2_norm(
    chunk_size: int, noop_flag: Tensor, tensor_lists: Sequence[Sequence[Tensor]], per_tensor: bool
) -> tuple[Tensor, None]:
    """Return the norm [1] of all tensors as one vector, fp32 on their device. Signature of amp_C's function."""
    assert not per_tensor
    [tensors] = tensor_lists
    norms = torch.stack(torch._foreach_norm(list(tensors)))
    return torch.linalg.vector_norm(norms).float()[None], None


def scale(chunk_size: int, noop_flag: Tensor, tensor_lists: Sequence[Sequence[Tensor]], factor: float) -> None:
    """Write the first list's tensors times `factor` to the second list's. Signature of amp_C's function."""
    source, target = map(list, tensor_lists)
    if all(ours is theirs for ours, theirs in zip(source, target, strict=True)):
        torch._foreach_mul_(target, factor)
    else:
        torch._foreach_copy_(target, torch._foreach_mul(source, factor))
