"""Softmax attention of tokens to those before them: the last of a sequence without gradients, or pieces with gradients.

No mask is made where the kernels can do without: a mask keeps them from skipping what a token does not see, and takes
more memory than all else. The last L of R tokens see R - L tokens completely, and themselves causally. The heads of
keys and values divide those of queries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_efficient_attention, can_use_flash_attention
from torch.nn.functional import scaled_dot_product_attention

# Of a mask, where one is needed. The plain form that then runs also makes as many scores for each head.
MASK_ELEMENTS = 2**24

# The kernels behind scaled_dot_product_attention on CPUs, which also give or take the logs of the exponentials' sums.
_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


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
    # Imported late, since it takes TorchDynamo along: 0.7 CPU seconds.
    from torch.nn.attention.bias import causal_lower_right

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
    """Attend on a CPU, where torch would make a mask of causal_lower_right."""
    return _attend_piece(_with_rows(q_BHLK), _with_rows(k_BHRK), _with_rows(v_BHRK), scale)[0]


def _with_rows(x: Tensor) -> Tensor:
    """Return x with its last dim in one piece, as the kernels take it for granted."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _attend_piece(q_BHLK: Tensor, k_BHRK: Tensor, v_BHRK: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
    """Attend to the tokens before the queries, then causally to their own, and join both by their sums of exponentials.

    Returns the output and the logs of the sums, [B, H, L].
    """
    first = k_BHRK.shape[2] - q_BHLK.shape[2]
    own, own_BHL = _forward(q_BHLK, k_BHRK[:, :, first:], v_BHRK[:, :, first:], 0.0, True, scale=scale)
    if first == 0:
        return own, own_BHL
    before, before_BHL = _forward(q_BHLK, k_BHRK[:, :, :first], v_BHRK[:, :, :first], 0.0, False, scale=scale)
    share_BHL = torch.sigmoid(own_BHL - before_BHL)
    return torch.lerp(before, own, share_BHL[..., None].to(own.dtype)), torch.logaddexp(own_BHL, before_BHL)


@dataclass(frozen=True)
class Piece:
    """Queries that follow each other in some sequences, and the keys that they see, of which the last are their own.

    sequences: indices of B. queries: indices of L. keys: indices of R.
    """

    sequences: slice
    queries: slice
    keys: slice

    def hides(self, window: int | None) -> bool:
        """Return whether the last query is too far from the first key to see it."""
        return window is not None and self.keys.stop - self.keys.start > window


def attend_pieces(
    q_BHLK: Tensor,
    k_BHRK: Tensor,
    v_BHRK: Tensor,
    pieces: Sequence[Piece],
    window: int | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attend causally in pieces, on a CPU and with gradients; return [B, H, L, K].

    Nothing is computed between tokens of different pieces, so that what is not finite stays in its own.

    Args:
        pieces: together all queries, each once.
        window: tokens that a token sees, its own included; None for all of its piece's keys.
        scale: of the scores; None for 1 / sqrt(K).
    """
    return _Pieces.apply(_with_rows(q_BHLK), _with_rows(k_BHRK), _with_rows(v_BHRK), pieces, window, scale)


class _Pieces(torch.autograd.Function):
    """The gradients of a part of the keys follow from the output and the sums of all keys."""

    @staticmethod
    def forward(
        ctx: Any,
        q_BHLK: Tensor,
        k_BHRK: Tensor,
        v_BHRK: Tensor,
        pieces: Sequence[Piece],
        window: int | None,
        scale: float | None,
    ) -> Tensor:
        o_BHLK = torch.empty_like(q_BHLK)
        sums_dtype = torch.promote_types(q_BHLK.dtype, torch.float32)
        sums_BHL = q_BHLK.new_empty(q_BHLK.shape[:3], dtype=sums_dtype)
        bands: dict[tuple[int, int], Tensor] = {}
        for piece in pieces:
            at, seen = (piece.sequences, slice(None), piece.queries), (piece.sequences, slice(None), piece.keys)
            q, k, v = q_BHLK[at], k_BHRK[seen], v_BHRK[seen]
            if piece.hides(window):
                assert window is not None
                band_LR = _band(bands, q, k, window)
                o_BHLK[at], sums_BHL[at] = _forward(q, k, v, 0.0, False, attn_mask=band_LR, scale=scale)
            else:
                o_BHLK[at], sums_BHL[at] = _attend_piece(q, k, v, scale)
        ctx.save_for_backward(q_BHLK, k_BHRK, v_BHRK, o_BHLK, sums_BHL)
        ctx.pieces, ctx.window, ctx.scale = pieces, window, scale
        return o_BHLK

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q_BHLK, k_BHRK, v_BHRK, o_BHLK, sums_BHL = ctx.saved_tensors
        grad_q, grad_k, grad_v = (torch.zeros_like(x) for x in (q_BHLK, k_BHRK, v_BHRK))
        bands: dict[tuple[int, int], Tensor] = {}
        for piece in ctx.pieces:
            at = piece.sequences, slice(None), piece.queries
            q, o, sums, grad_o = (x[at] for x in (q_BHLK, o_BHLK, sums_BHL, grads[0]))
            for keys, is_causal, is_banded in _parts(piece, ctx.window):
                seen = piece.sequences, slice(None), keys
                k, v = k_BHRK[seen], v_BHRK[seen]
                mask = _band(bands, q, k, ctx.window) if is_banded else None
                of_part = _backward(grad_o, q, k, v, o, sums, 0.0, is_causal, attn_mask=mask, scale=ctx.scale)
                for grad, place, part in zip((grad_q, grad_k, grad_v), (at, seen, seen), of_part, strict=True):
                    grad[place] += part
        return grad_q, grad_k, grad_v, None, None, None


def _parts(piece: Piece, window: int | None) -> list[tuple[slice, bool, bool]]:
    """Return the keys that the kernel takes at once, whether causally, and whether with the window's mask."""
    if piece.hides(window):
        return [(piece.keys, False, True)]
    own = piece.keys.stop - (piece.queries.stop - piece.queries.start)
    before = [(slice(piece.keys.start, own), False, False)] if own > piece.keys.start else []
    return [*before, (slice(own, piece.keys.stop), True, False)]


def _band(bands: dict[tuple[int, int], Tensor], q_BHLK: Tensor, k_BHRK: Tensor, window: int) -> Tensor:
    """Return what to add to the scores of L queries at the end of R keys [L, R]; `bands` keeps the last one."""
    size = q_BHLK.shape[2], k_BHRK.shape[2]
    if size not in bands:
        bands.clear()
        seen, last = q_BHLK.new_ones(size, dtype=torch.bool), size[1] - size[0]
        seen = seen.tril(last).triu(last - window + 1)
        bands[size] = q_BHLK.new_zeros(size).masked_fill_(~seen, -torch.inf)
    return bands[size]
