"""Softmax attention of the last tokens of a sequence to all of it, without gradients.

No mask is made where the kernels can do without: a mask keeps them from skipping what a token does not see, and takes
more memory than all else. The last L of R tokens see R - L tokens completely, and themselves causally. The heads of
keys and values divide those of queries.
"""

import torch
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_efficient_attention, can_use_flash_attention
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

# Of a mask, where one is needed. The plain form that then runs also makes as many scores for each head.
MASK_ELEMENTS = 2**24


def attend_last(q_BHLK: Tensor, k_BHRK: Tensor, v_BHRK: Tensor, scale: float | None = None) -> Tensor:
    """Attend from the last L of R tokens, each to the tokens up to itself; return [B, H, L, K].

    scale: of the scores; None for 1 / sqrt(K).
    """
    length, num_keys = q_BHLK.shape[2], k_BHRK.shape[2]
    if length in (1, num_keys):
        return scaled_dot_product_attention(q_BHLK, k_BHRK, v_BHRK, is_causal=length > 1, scale=scale, enable_gqa=True)
    attend = _attend_lower_right if q_BHLK.is_cuda else _attend_in_parts
    return attend(q_BHLK, k_BHRK, v_BHRK, scale)


def _attend_lower_right(q_BHLK: Tensor, k_BHRK: Tensor, v_BHRK: Tensor, scale: float | None) -> Tensor:
    """Attend with torch's causal bias, which its kernels for GPUs know."""
    length, num_keys = q_BHLK.shape[2], k_BHRK.shape[2]
    most, params = length, SDPAParams(q_BHLK, k_BHRK, v_BHRK, None, 0.0, False, True)
    if not can_use_flash_attention(params) and not can_use_efficient_attention(params):
        # torch makes a mask of it then: queries are taken in blocks that bound it.
        most = max(1, MASK_ELEMENTS // num_keys)
    outputs, end = [], num_keys - length
    for q in q_BHLK.split(most, dim=2):
        end += q.shape[2]
        bias = causal_lower_right(q.shape[2], end)
        k, v = k_BHRK[:, :, :end], v_BHRK[:, :, :end]
        outputs.append(scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale, enable_gqa=True))
    return torch.cat(outputs, dim=2) if len(outputs) > 1 else outputs[0]


def _attend_in_parts(q_BHLK: Tensor, k_BHRK: Tensor, v_BHRK: Tensor, scale: float | None) -> Tensor:
    """Attend to the tokens before the queries, then causally to their own, and join both by their sums of exponentials.

    On CPUs torch would make a mask of causal_lower_right.
    """
    # The kernel behind scaled_dot_product_attention, which also returns the log of the sums.
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    first = k_BHRK.shape[2] - q_BHLK.shape[2]
    before, own = (
        attend(q_BHLK, k_BHRK[:, :, rows], v_BHRK[:, :, rows], 0.0, is_causal, scale=scale)
        for rows, is_causal in ((slice(first), False), (slice(first, None), True))
    )
    share_BHL = torch.sigmoid(own[1] - before[1])
    return torch.lerp(before[0], own[0], share_BHL[..., None].to(own[0].dtype))
