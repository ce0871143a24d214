"""The recurrences of a megatron-sse model in plain torch, chunk by chunk.

Dims: B batch, L tokens, C tokens of a chunk, M states of a sequence (banks x heads), K and V channels of keys and
values.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

GLA_CHUNK, GDN_CHUNK = 16, 64


class Documents(NamedTuple):
    """last_BL: the document of each token (int64), of padding that of the token before it. before_B: of the state."""

    last_BL: Tensor
    before_B: Tensor


class Decays(NamedTuple):
    """Shares that remain of a token's write, by channel; 0 across the borders of documents.

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
    Returns outputs [B, L, M, V] and the new state. The state starts anew with each document. No value of one
    document reaches another, not even inf or nan; from such a value on, the outputs of its document are nan.
    """
    return _run(GLA_CHUNK, _meet, (q, k, v), g, state, documents)


def gdn(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor | None, documents: Documents | None
) -> tuple:
    """Run S <- exp(g) (I - beta k^T k) S + beta k^T v, o = q S / sqrt(K). As gla(); g and beta [B, L, M]."""
    return _run(GDN_CHUNK, _meet_by_head, (q, k, v, beta[..., None]), g[..., None], state, documents)


def kda(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor | None, documents: Documents | None
) -> tuple:
    """Run S <- (I - beta k^T k) diag(exp(g)) S + beta k^T v, o = q S / sqrt(K). As gdn(); g [B, L, M, K]."""
    return _run(GDN_CHUNK, _meet, (q, k, v, beta[..., None]), g, state, documents)


def _meet(q: Tensor, k: Tensor, between: Tensor) -> Tensor:
    """Return the products of queries and decayed keys, [B, M, C, C]."""
    return torch.einsum("bmtk,bmsk,bmtsk->bmts", q, k, between)


def _meet_by_head(q: Tensor, k: Tensor, between: Tensor) -> Tensor:
    """Do what _meet does where all channels of a head decay alike."""
    return q @ k.transpose(-1, -2) * between[..., 0]


def _run(
    size: int,
    meet: Callable[[Tensor, Tensor, Tensor], Tensor],
    rows: tuple[Tensor, ...],
    g: Tensor,
    state: Tensor | None,
    documents: Documents | None,
) -> tuple[Tensor, Tensor]:
    """Run a recurrence in chunks of `size` rows. rows: q, k, v, and for the delta rule beta, [B, L, M, c]."""
    q, k, v, *beta = rows
    state = k.new_zeros(k.shape[0], k.shape[2], k.shape[3], v.shape[3]) if state is None else state
    rows, spoiled_BL = (q * q.shape[-1] ** -0.5, k, v, *beta), None
    if documents is not None:
        # Products with 0 do not keep documents apart, since 0 * inf is nan: such rows take no part in them.
        spoiled_BL = _find_spoiled((*rows, g.exp()), state, documents)
        *rows, g = (x.masked_fill(spoiled_BL[..., None, None], 0) for x in (*rows, g))  # type: ignore[assignment]
        state = state.masked_fill(~_is_finite(state)[:, None, None, None], 0)
    outputs = []
    for (q_c, k_c, v_c, *beta_c), decays in _chunks(size, tuple(rows), g, documents):
        written = v_c
        if beta_c:
            # The delta rule: what the rows write, given how far their keys meet.
            met = (beta_c[0] * meet(k_c, k_c, decays.between)).tril(-1)
            wanted = beta_c[0] * (v_c - (k_c * decays.from_start) @ state)
            written = torch.linalg.solve_triangular(met, wanted, upper=False, unitriangular=True)
        outputs.append((q_c * decays.from_start) @ state + meet(q_c, k_c, decays.between) @ written)
        state = decays.across * state + (k_c * decays.to_end).transpose(-1, -2) @ written
    o = torch.cat(outputs, dim=2).transpose(1, 2)
    if spoiled_BL is None:
        return o, state
    o = o.masked_fill(spoiled_BL[..., None, None], torch.nan)
    return o, state.masked_fill(spoiled_BL[:, -1, None, None, None], torch.nan)


def _find_spoiled(rows: tuple[Tensor, ...], state: Tensor, documents: Documents) -> Tensor:
    """Return whether a token or one before it in its document has a value that is not finite, bool [B, L]."""
    last_BL = documents.last_BL
    number_BL = torch.arange(last_BL.shape[1], device=last_BL.device).expand_as(last_BL)
    bad_BL = torch.stack([~_is_finite(x, 2) for x in rows]).any(0)
    # A state that is not finite spoils the document that it is of.
    bad_BL = bad_BL | (~_is_finite(state)[:, None] & (last_BL == documents.before_B[:, None]))
    starts_BL = torch.cat((torch.ones_like(bad_BL[:, :1]), last_BL[:, 1:] != last_BL[:, :-1]), dim=1)
    first_BL = torch.where(starts_BL, number_BL, 0).cummax(-1).values
    return torch.where(bad_BL, number_BL, -1).cummax(-1).values >= first_BL


def _is_finite(x: Tensor, num_dims: int = 1) -> Tensor:
    """Return, over all but the first dims, whether no value is inf, nan, or so large that sums of it would be inf."""
    return (x.detach().abs().flatten(num_dims) <= torch.finfo(x.dtype).max * 2.0**-20).all(-1)


def _chunks(
    size: int, rows: tuple[Tensor, ...], g: Tensor, documents: Documents | None
) -> Iterator[tuple[list[Tensor], Decays]]:
    """Yield the rows of each chunk, [B, M, C, c], and their decays. rows, g: [B, L, M, c]."""
    chunks = [x.transpose(1, 2).split(size, dim=2) for x in (*rows, g)]
    lasts = [None] * len(chunks[0]) if documents is None else documents.last_BL.split(size, dim=1)
    before_B = None if documents is None else documents.before_B
    for *rows_c, g_c, last_BC in zip(*chunks, lasts, strict=True):
        ones = torch.ones(g_c.shape[2], g_c.shape[2], dtype=torch.bool, device=g_c.device)
        # Each sum is taken on its own: a difference of two running sums loses digits, and depends on other documents.
        between = g_c[:, :, :, None].masked_fill(ones.triu()[..., None], 0).cumsum(2)
        apart, from_start = ones.triu(1), g_c.cumsum(2).exp()
        if last_BC is not None and before_B is not None:
            apart = apart | (last_BC[:, None, :, None] != last_BC[:, None, None])
            from_start = from_start * (last_BC == before_B[:, None])[:, None, :, None]
            before_B = last_BC[:, -1]
        between = between.masked_fill(apart[..., None], float("-inf")).exp()
        yield rows_c, Decays(between, from_start, between[:, :, -1], from_start[:, :, -1:].transpose(-1, -2))
