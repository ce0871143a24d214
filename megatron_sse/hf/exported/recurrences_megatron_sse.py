"""The recurrences of a megatron-sse model in plain torch, chunk by chunk.

Dims: B batch, L tokens, C tokens of a chunk, M states of a sequence (banks x heads), K and V channels of keys and
values.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

GLA_CHUNK, GDN_CHUNK = 16, 64


class Documents(NamedTuple):
    """last_BL: the document of each token (int64), of padding that of the token before it. before_B: of the state."""

    last_BL: Tensor
    before_B: Tensor


class Decays(NamedTuple):
    """What is left of a token's write, by channel; 0 across the borders of documents.

    between: from the row of the second to that of the first dim, [B, M, C, C, K], 0 for rows that come later.
    from_start, to_end: from the chunk's start to each row, from each row to its end, [B, M, C, K].
    across: from start to end, [B, M, K, 1].
    """

    between: Tensor
    from_start: Tensor
    to_end: Tensor
    across: Tensor


def gla(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor | None, documents: Documents | None) -> tuple:
    """Run S <- diag(exp(g)) S + k^T v, o = q S / sqrt(K).

    q, k, v, g: [B, L, M, K or V], fp32; g is the log decay. state: [B, M, K, V], None for zeros.
    Returns outputs [B, L, M, V] and the new state. The state starts anew with each document.
    """
    q, state = q * q.shape[-1] ** -0.5, _first_state(k, v, state)
    outputs = []
    for (q_c, k_c, v_c), decays in _chunks(GLA_CHUNK, (q, k, v), g, documents):
        scores = torch.einsum("bmtk,bmsk,bmtsk->bmts", q_c, k_c, decays.between)
        outputs.append((q_c * decays.from_start) @ state + scores @ v_c)
        state = decays.across * state + (k_c * decays.to_end).transpose(-1, -2) @ v_c
    return torch.cat(outputs, dim=2).transpose(1, 2), state


def gdn(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor | None, documents: Documents | None
) -> tuple:
    """Run S <- exp(g) (I - beta k^T k) S + beta k^T v, o = q S / sqrt(K). As gla(); g and beta [B, L, M]."""
    q, state = q * q.shape[-1] ** -0.5, _first_state(k, v, state)
    outputs = []
    for (q_c, k_c, v_c, beta_c), decays in _chunks(GDN_CHUNK, (q, k, v, beta[..., None]), g[..., None], documents):
        between = decays.between[..., 0]
        met = (beta_c * (k_c @ k_c.transpose(-1, -2)) * between).tril(-1)
        scores = q_c @ k_c.transpose(-1, -2) * between
        written = _written(met, beta_c * (v_c - (k_c * decays.from_start) @ state))
        outputs.append((q_c * decays.from_start) @ state + scores @ written)
        state = decays.across * state + (k_c * decays.to_end).transpose(-1, -2) @ written
    return torch.cat(outputs, dim=2).transpose(1, 2), state


def kda(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor | None, documents: Documents | None
) -> tuple:
    """Run S <- (I - beta k^T k) diag(exp(g)) S + beta k^T v, o = q S / sqrt(K). As gdn(); g [B, L, M, K]."""
    q, state = q * q.shape[-1] ** -0.5, _first_state(k, v, state)
    outputs = []
    for (q_c, k_c, v_c, beta_c), decays in _chunks(GDN_CHUNK, (q, k, v, beta[..., None]), g, documents):
        met = (beta_c * torch.einsum("bmtk,bmsk,bmtsk->bmts", k_c, k_c, decays.between)).tril(-1)
        scores = torch.einsum("bmtk,bmsk,bmtsk->bmts", q_c, k_c, decays.between)
        written = _written(met, beta_c * (v_c - (k_c * decays.from_start) @ state))
        outputs.append((q_c * decays.from_start) @ state + scores @ written)
        state = decays.across * state + (k_c * decays.to_end).transpose(-1, -2) @ written
    return torch.cat(outputs, dim=2).transpose(1, 2), state


def _first_state(k: Tensor, v: Tensor, state: Tensor | None) -> Tensor:
    return k.new_zeros(k.shape[0], k.shape[2], k.shape[3], v.shape[3]) if state is None else state


def _written(met: Tensor, wanted: Tensor) -> Tensor:
    """Return what the rows of a chunk write under the delta rule, given how far their keys meet."""
    return torch.linalg.solve_triangular(met, wanted, upper=False, unitriangular=True)


def _chunks(
    size: int, rows: tuple[Tensor, ...], g: Tensor, documents: Documents | None
) -> Iterator[tuple[list[Tensor], Decays]]:
    """Yield the rows of each chunk, [B, M, C, c], and their decays. rows, g: [B, L, M, c]."""
    chunks = [x.transpose(1, 2).split(size, dim=2) for x in (*rows, g)]
    lasts = [None] * len(chunks[0]) if documents is None else documents.last_BL.split(size, dim=1)
    before_B = None if documents is None else documents.before_B
    for *rows_c, g_c, last_BC in zip(*chunks, lasts, strict=True):
        total = g_c.cumsum(2)
        end = total[:, :, -1:]
        # Later rows are left out before the exponential, which may overflow for them.
        apart = torch.ones(g_c.shape[2], g_c.shape[2], dtype=torch.bool, device=g_c.device).triu(1)
        from_start, to_end, across = total.exp(), (end - total).exp(), end.exp().transpose(-1, -2)
        if last_BC is not None and before_B is not None:
            apart = apart | (last_BC[:, None, :, None] != last_BC[:, None, None])
            leaves_BC, end_B1 = last_BC == before_B[:, None], last_BC[:, -1:]
            from_start = from_start * leaves_BC[:, None, :, None]
            to_end = to_end * (last_BC == end_B1)[:, None, :, None]
            across = across * leaves_BC[:, None, -1:, None]
            before_B = end_B1[:, 0]
        between = (total[:, :, :, None] - total[:, :, None]).masked_fill(apart[..., None], float("-inf")).exp()
        yield rows_c, Decays(between, from_start, to_end, across)
