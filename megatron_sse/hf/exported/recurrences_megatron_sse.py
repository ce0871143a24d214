"""The recurrences of a megatron-sse model in plain torch: products of matrices inside chunks, a scan between them.

Dims: B batch, L tokens, G chunks of C tokens, M states of a sequence (banks x heads), K and V channels of keys and
values.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from .tokens_megatron_sse import is_finite, spread

# Tokens of a chunk, a power of two, and of all chunks that are computed at once.
CHUNK, BLOCK = 32, 512

# For each of the queries its scores [..., C, C] and the query decayed from the chunk's start; keys decayed to its end,
# and the decay over the chunk [..., 1, K or 1].
Met = tuple[Sequence[Tensor], Sequence[Tensor], Tensor, Tensor]


def gla(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor | None, starts_BL: Tensor | None) -> tuple:
    """Run S <- diag(exp(g)) S + k^T v, o = q S / sqrt(K).

    q, k, v, g: [B, L, M, K or V], fp32; g is the log decay. state: [B, M, K, V], None for zeros. starts_BL: bool, where
    documents start; None for nowhere.
    Returns outputs [B, L, M, V] and the new state. The state starts anew with each document. No value of one
    document reaches another, not even inf or nan; from such a value on, the outputs of its document are nan.
    """
    return _run(meet, (q, k, v), g, state, starts_BL)


def gdn(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor | None, starts_BL: Tensor | None
) -> tuple:
    """Run S <- exp(g) (I - beta k^T k) S + beta k^T v, o = q S / sqrt(K). As gla(); g and beta [B, L, M]."""
    return _run(meet_by_head, (q, k, v, beta[..., None]), g[..., None], state, starts_BL)


def kda(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor | None, starts_BL: Tensor | None
) -> tuple:
    """Run S <- (I - beta k^T k) diag(exp(g)) S + beta k^T v, o = q S / sqrt(K). As gdn(); g [B, L, M, K]."""
    return _run(meet, (q, k, v, beta[..., None]), g, state, starts_BL)


def meet(queries: Sequence[Tensor], k: Tensor, decay: Tensor) -> Met:
    """Return scores q_t (decay_t ... decay_{s + 1}) k_s for s <= t inside each chunk, and what Met names besides.

    queries: several q, [..., C, K] as k. decay: [..., C, K or 1], in [0, 1]. Only products of decays occur, never a
    quotient or a difference of logarithms: exact for any decay, and a decay of 0 parts the rows before it from those
    behind it.
    """
    scores = [(q * k).sum(-1)[..., None, None] for q in queries]
    queries, total = [q * decay for q in queries], decay
    # Blocks of `half` rows are joined in pairs, with q and k decayed to the borders of their block. Of 4 rows, blocks
    # of 1 have the scores q_t k_t; then come blocks (0 1) and (2 3); at last queries 2 and 3 meet keys 0 and 1.
    half = 1
    while half < k.shape[-2]:
        (k_early, k_late), (total_early, total_late) = _pairs(k, half), _pairs(total, 1)
        for number, q in enumerate(queries):
            q_early, q_late = _pairs(q, half)
            met = q_late @ k_early.transpose(-1, -2)
            scores_early, scores_late = scores[number].unflatten(-3, (-1, 2)).unbind(-3)
            upper = torch.cat((scores_early, torch.zeros_like(met)), dim=-1)
            scores[number] = torch.cat((upper, torch.cat((met, scores_late), dim=-1)), dim=-2)
            queries[number] = torch.stack((q_early, q_late * total_early), dim=-3).flatten(-4, -2)
        k = torch.stack((k_early * total_late, k_late), dim=-3).flatten(-4, -2)
        total = (total_early * total_late).squeeze(-2)
        half *= 2
    return [x.squeeze(-3) for x in scores], queries, k, total


def _pairs(x: Tensor, half: int) -> tuple[Tensor, ...]:
    """Return [..., C, c] as early and late halves [..., C / (2 half), half, c] of neighbouring blocks."""
    return x.unflatten(-2, (-1, 2, half)).unbind(-3)


def meet_by_head(queries: Sequence[Tensor], k: Tensor, decay: Tensor) -> Met:
    """Do what meet does where all channels of a head decay alike, decay [..., C, 1]: in one product."""
    ones = torch.ones_like(decay)
    [between], [from_start], to_end, total = meet([ones], ones, decay)
    scores = [q @ k.transpose(-1, -2) * between for q in queries]
    return scores, [q * from_start for q in queries], k * to_end, total


def _run(
    meet: Callable[..., Met], rows: tuple[Tensor, ...], g: Tensor, state: Tensor | None, starts_BL: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Run a recurrence block by block. rows: q, k, v, and for the delta rule beta, [B, L, M, c]."""
    q, k, v, *beta = rows
    state = k.new_zeros(k.shape[0], k.shape[2], k.shape[3], v.shape[3]) if state is None else state
    rows, decay, spoiled_BL = (q * q.shape[-1] ** -0.5, k, v, *beta), g.exp(), None
    if starts_BL is not None:
        # Products with 0 do not keep documents apart, since 0 * inf is nan: such rows take no part in them.
        bad_BL = torch.stack([~is_finite(x, (2, 3)) for x in (*rows, decay)]).any(0)
        bad_B = ~is_finite(state, (1, 2, 3), 2.0**108)
        # A state that is not finite spoils the document that it is of, which the first token may go on with.
        first_BL = torch.arange(bad_BL.shape[1], device=bad_BL.device) == 0
        spoiled_BL = spread(bad_BL | first_BL & bad_B[:, None] & ~starts_BL, starts_BL)
        rows = tuple(x.masked_fill(spoiled_BL[..., None, None], 0) for x in rows)
        decay = decay.masked_fill((spoiled_BL | starts_BL)[..., None, None], 0)
        state = state.masked_fill(bad_B[:, None, None, None], 0)
    if q.shape[1] == 1:
        o, state = _step([x[:, 0] for x in (*rows, decay)], state)
        return _spoil(o[:, None], state, spoiled_BL)
    outputs = []
    for block in zip(*(x.transpose(1, 2).split(BLOCK, dim=2) for x in (*rows, decay)), strict=True):
        o, state = _run_block(meet, block, state)
        outputs.append(o)
    return _spoil(torch.cat(outputs, dim=2).transpose(1, 2), state, spoiled_BL)


def _spoil(o: Tensor, state: Tensor, spoiled_BL: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return outputs and the new state, with nan for spoiled tokens."""
    if spoiled_BL is None:
        return o, state
    o = o.masked_fill(spoiled_BL[..., None, None], torch.nan)
    return o, state.masked_fill(spoiled_BL[:, -1, None, None, None], torch.nan)


def _step(rows: Sequence[Tensor], state: Tensor) -> tuple[Tensor, Tensor]:
    """Return the outputs of one token [B, M, V] and the new state. rows: as in _run_block, [B, M, c]."""
    q, k, v, *beta, decay = rows
    state = decay[..., None] * state
    if beta:
        v = beta[0] * (v - (k[..., None, :] @ state).squeeze(-2))
    state = state + k[..., None] * v[..., None, :]
    return (q[..., None, :] @ state).squeeze(-2), state


def _run_block(meet: Callable[..., Met], rows: tuple[Tensor, ...], state: Tensor) -> tuple[Tensor, Tensor]:
    """Return outputs [B, M, L, V] and the new state. rows: as in _run, and their decays, [B, M, L, c]."""
    length = rows[0].shape[2]
    size = min(CHUNK, 1 << (length - 1).bit_length())
    if length % size:
        # Rows that leave the state as it is.
        *others, decay = (pad(x, (0, 0, 0, -length % size)) for x in rows)
        added = torch.arange(decay.shape[2], device=decay.device) >= length
        rows = (*others, decay.masked_fill(added[:, None], 1))
    q, k, v, *beta, decay = (x.unflatten(2, (-1, size)) for x in rows)
    (scores, *met), (q, *k_from_start), k_kept, total = meet((q, *(x * k for x in beta)), k, decay)
    k_kept, total = k_kept.transpose(-1, -2), total.transpose(-1, -2)
    entering, written = [], v
    if beta:
        # The delta rule: rows write u - w S into the state S that enters the chunk, given how far their keys meet.
        wanted = torch.cat((beta[0] * v, *k_from_start), dim=-1)
        solved = torch.linalg.solve_triangular(met[0], wanted, upper=False, unitriangular=True)
        u, w = solved.split((v.shape[-1], k.shape[-1]), dim=-1)
        of_chunks = []
        for u_c, w_c, k_c, total_c in zip(*(x.unbind(2) for x in (u, w, k_kept, total)), strict=True):
            entering.append(state)
            of_chunks.append(u_c - w_c @ state)
            state = total_c * state + k_c @ of_chunks[-1]
        written = torch.stack(of_chunks, dim=2)
    else:
        for added_c, total_c in zip((k_kept @ v).unbind(2), total.unbind(2), strict=True):
            entering.append(state)
            state = total_c * state + added_c
    o = q @ torch.stack(entering, dim=2) + scores @ written
    return o.flatten(2, 3)[:, :, :length], state
