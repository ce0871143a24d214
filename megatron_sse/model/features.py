"""Activations of queries, keys and decays (arXiv 2507.16577, section 3.1 and appendix)."""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, silu, softplus

_LARGEST_LOG_RATE = 80.0


def softmax_fp32(x: Tensor) -> Tensor:
    """Return the softmax over the last dim, in fp32 at least."""
    return x.softmax(-1, dtype=torch.promote_types(x.dtype, torch.float32))


# By the settings query_map and key_map.
_MAPS: dict[str, Callable[[Tensor], Tensor]] = {"silu": silu, "softmax": softmax_fp32}


def map_query(q_THK: Tensor, kind: str) -> Tensor:
    """Return the queries after the query map, silu or softmax."""
    return _MAPS[kind](q_THK)


def map_key(k_THK: Tensor | None, g_THK: Tensor, kind: str, topk: int | None) -> tuple[Tensor, Tensor]:
    """Return keys and log decays after the key map.

    kind: softmax; silu; topk_softmax (row-sparse: softmax over the `topk` largest, other rows 0 and not decayed; equal
    values go to the lower index); one_minus_decay (HGRN2, k_THK is None).
    """
    if kind == "one_minus_decay":
        # 1 - exp(g): what the state forgets is what the key may write. expm1 keeps the digits of decays near 1.
        return -torch.expm1(g_THK), g_THK
    assert k_THK is not None
    if kind != "topk_softmax":
        return _MAPS[kind](k_THK), g_THK
    rows = k_THK.detach().sort(dim=-1, descending=True, stable=True).indices[..., :topk]
    picked = torch.zeros_like(k_THK, dtype=torch.bool).scatter(-1, rows, True)
    return softmax_fp32(k_THK.masked_fill(~picked, float("-inf"))), g_THK.masked_fill(~picked, 0)


def gate_decay(logit: Tensor, normalizer: float) -> Tensor:
    """Return GLA's log decay, logsigmoid(logit) / normalizer, in fp32 at least."""
    return logsigmoid(logit.to(torch.promote_types(logit.dtype, torch.float32))) / normalizer


def constant_decay(num_heads: int) -> Tensor:
    """Return RetNet's and Lightning Attention's log decay per head, log(1 - 2^(-5 - h)), fp32 [H]."""
    return torch.tensor([math.log1p(-(2.0 ** (-5 - head))) for head in range(num_heads)])


def delta_decay(logit: Tensor, log_rate: Tensor, bias: Tensor) -> Tensor:
    """Return the delta rule's log decay, -exp(A_log) softplus(logit + dt_bias), in fp32 at least.

    Rates above exp(80) forget everything as it does; they would overflow, and inf * 0 is nan.
    """
    logit = logit.to(torch.promote_types(logit.dtype, torch.float32))
    return -log_rate.clamp(max=_LARGEST_LOG_RATE).exp() * softplus(logit + bias)
