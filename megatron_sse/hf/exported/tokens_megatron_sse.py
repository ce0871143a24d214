"""Which tokens of a batch are real, which document each belongs to, and its place there.

Dims: B batch, L tokens of this call, R tokens so far and these, T tokens of the batch in one row, c channels.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad


class Flat(NamedTuple):
    """A batch laid out in one row, as the kernels of the package megatron_sse take it.

    offsets_B1: int64, sequence b holds tokens offsets[b] to offsets[b + 1]. sequence_T: int64, each token's sequence.
    document_T: int64, each token's document; None where each sequence is one.
    """

    offsets_B1: Tensor
    sequence_T: Tensor
    document_T: Tensor | None


class Tokens(NamedTuple):
    """Positions and documents of the tokens of a call, made once per call. A tuple, so that accelerate can move it.

    num_before: tokens of earlier calls, which the cache holds.
    position_BL: rotary positions.
    document_BR: int64, the number of each token's document in its sequence, -1 for padding. None where every token is
        real and each sequence is one document; so are the next three.
    index_BR: int64, the number of each real token in its document.
    starts_BR: bool, where a document starts.
    order_BL: int64, the columns of the real tokens, then those of padding.
    flat: given where the package's kernels run the recurrences.
    """

    num_before: int
    position_BL: Tensor
    document_BR: Tensor | None = None
    index_BR: Tensor | None = None
    starts_BR: Tensor | None = None
    order_BL: Tensor | None = None
    flat: Flat | None = None

    def real_BL(self) -> Tensor | None:
        """Return which tokens are real; None where all are."""
        return None if self.document_BR is None else self.document_BR[:, self.num_before :] >= 0

    def starts_BL(self) -> Tensor | None:
        """Return where documents start; None for nowhere."""
        return None if self.starts_BR is None else self.starts_BR[:, self.num_before :]

    def sees(self, window: int | None, num_queries: int) -> Tensor | None:
        """Return which tokens so far a token attends to, bool [B or 1, 1, L, R]; None for plain causal attention."""
        num_keys, device = self.num_before + num_queries, self.position_BL.device
        if self.document_BR is None and self.num_before == 0 and window is None:
            return None
        number_R = torch.arange(num_keys, device=device)
        seen = number_R[self.num_before :, None] >= number_R
        if self.document_BR is None or self.index_BR is None:
            if window is not None:
                seen = seen & (number_R[self.num_before :, None] - number_R < window)
            return seen[None, None]
        document_BL, index_BL = self.document_BR[:, self.num_before :], self.index_BR[:, self.num_before :]
        seen = seen & (document_BL[..., None] == self.document_BR[:, None])
        if window is not None:
            seen = seen & (index_BL[..., None] - self.index_BR[:, None] < window)
        # Padding sees itself: a row without keys would give NaN.
        itself = number_R[self.num_before :, None] == number_R
        return (seen & (self.document_BR[:, None] >= 0) | itself)[:, None]


def make_tokens(
    x_BLd: Tensor,
    num_before: int = 0,
    kept_BR: Tensor | None = None,
    real_BL: Tensor | None = None,
    position_BL: Tensor | None = None,
    start_BL: Tensor | None = None,
    with_flat: bool = False,
) -> Tokens:
    """Return what is to be known of the tokens of a call.

    x_BLd: their embeddings. kept_BR: document_BR of earlier calls, where it was needed. real_BL: False for padding.
    position_BL: rotary positions; where they do not go on by one, a document starts. start_BL: where others say so.
    with_flat: also lay out the batch for the kernels.
    """
    device, (batch_size, length) = x_BLd.device, x_BLd.shape[:2]
    if position_BL is not None:
        position_BL = position_BL.expand(batch_size, -1)
        if length > 1:
            jumps_BL = _jumps(position_BL, real_BL)
            start_BL = jumps_BL if start_BL is None else start_BL | jumps_BL
    if not torch.compiler.is_compiling():
        # A compiled graph cannot ask for values; otherwise plain rows are faster without masks.
        real_BL = None if real_BL is None or bool(real_BL.all()) else real_BL
        start_BL = None if start_BL is None or not bool(start_BL[:, 1:].any()) else start_BL
    if kept_BR is None and real_BL is None and start_BL is None:
        if position_BL is None:
            position_BL = torch.arange(num_before, num_before + length, device=device)[None]
        return Tokens(num_before, position_BL, flat=_flatten(x_BLd, None) if with_flat else None)

    real_BL = torch.ones(batch_size, length, dtype=torch.bool, device=device) if real_BL is None else real_BL
    start_BL = torch.zeros_like(real_BL) if start_BL is None else start_BL & real_BL
    # The first token goes on where earlier calls ended.
    start_BL = start_BL & (torch.arange(length, device=device) > 0)
    if kept_BR is None:
        kept_BR = torch.zeros(batch_size, num_before, dtype=torch.int64, device=device)
    before_B = kept_BR.amax(-1) if num_before else torch.full((batch_size,), -1, device=device)
    # For real 0 1 1 1 0 1 and a start at column 3: documents -1 0 0 1 -1 1, last -1 0 0 1 1 1, index 0 0 1 0 0 1.
    document_BL = (before_B.clamp(min=0)[:, None] + start_BL.cumsum(-1)).masked_fill(~real_BL, -1)
    document_BR = torch.cat((kept_BR, document_BL), dim=1)
    last_BR = document_BR.cummax(-1).values
    count_BR = (document_BR >= 0).cumsum(-1)
    starts_BR = document_BR > pad(last_BR[:, :-1], (1, 0), value=-1)
    index_BR = count_BR - 1 - torch.where(starts_BR, count_BR - 1, 0).cummax(-1).values
    index_BR = index_BR.clamp(min=0)
    return Tokens(
        num_before=num_before,
        position_BL=index_BR[:, num_before:] if position_BL is None else position_BL,
        document_BR=document_BR,
        index_BR=index_BR,
        starts_BR=starts_BR,
        order_BL=real_BL.int().argsort(dim=-1, descending=True, stable=True),
        flat=_flatten(x_BLd, start_BL) if with_flat else None,
    )


def _jumps(position_BL: Tensor, real_BL: Tensor | None) -> Tensor:
    """Return where the position of a real token is not the next one after that of the real token before it."""
    column_BL = torch.arange(position_BL.shape[1], device=position_BL.device).expand_as(position_BL)
    if real_BL is not None:
        column_BL = column_BL.masked_fill(~real_BL, -1).cummax(-1).values
    before_BL = pad(column_BL[:, :-1], (1, 0), value=-1)
    jumps_BL = (position_BL != position_BL.gather(1, before_BL.clamp(min=0)) + 1) & (before_BL >= 0)
    return jumps_BL if real_BL is None else jumps_BL & real_BL


def _flatten(x_BLd: Tensor, start_BL: Tensor | None) -> Flat:
    """Lay out the sequences. start_BL: where documents start inside them; None where each sequence is one."""
    (batch_size, length, _), device = x_BLd.shape, x_BLd.device
    offsets_B1 = torch.arange(batch_size + 1, device=device) * length
    first_T = torch.arange(batch_size * length, device=device) % length == 0
    sequence_T = first_T.cumsum(0) - 1
    return Flat(offsets_B1, sequence_T, None if start_BL is None else (first_T | start_BL.flatten()).cumsum(0) - 1)


def spread(bad: Tensor, starts: Tensor) -> Tensor:
    """Return whether a token or one before it in its document is bad, bool [B, n]. starts: where documents start."""
    if starts.shape[1] == 1:
        return bad
    number_n = torch.arange(starts.shape[1], device=starts.device)
    first = torch.where(starts, number_n, 0).cummax(-1).values
    return torch.where(bad, number_n, -1).cummax(-1).values >= first


def is_finite(x: Tensor, dims: tuple[int, ...], largest: float = 2.0**56) -> Tensor:
    """Return, over these dims, whether no value is inf, nan or so large that sums of products of two would be inf."""
    # The norm is nan where a value is.
    return torch.linalg.vector_norm(x.detach(), torch.inf, dim=dims) <= min(largest, torch.finfo(x.dtype).max)


def hold_gradients(x: Tensor) -> Tensor:
    """Return x [B, L, ...] with nan for tokens that are not finite, through which no gradient passes.

    Theirs is nan, and would reach tokens that they were computed from, from there other documents.
    """
    if not x.requires_grad:
        return x
    bad_BL = ~is_finite(x, tuple(range(2, x.dim())), torch.inf)
    return x.masked_fill(bad_BL.view(*bad_BL.shape, *[1] * (x.dim() - 2)), torch.nan)


class ShortConvolution(nn.Conv1d):
    """A causal depthwise convolution over the real tokens of a document, of which each has one channel group."""

    def __init__(self, channels: int, width: int):
        super().__init__(channels, channels, width, groups=channels, bias=False)

    def forward(self, x_BLc: Tensor, tail: Tensor | None, tokens: Tokens) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Return the result and the new tail: the last real tokens, as many as the next call looks back.

        tail: that of the call before, [B, width - 1, c]; None for none.
        """
        width, (batch_size, length, channels) = self.kernel_size[0], x_BLc.shape
        tail = x_BLc.new_zeros(batch_size, width - 1, channels) if tail is None else tail
        real_BL = tokens.real_BL()
        if real_BL is None or tokens.index_BR is None or tokens.order_BL is None:
            x_BLc = torch.cat((tail, x_BLc), dim=1)
            if length == 1:
                return (x_BLc * self.weight[:, 0].t()).sum(1, keepdim=True), x_BLc[:, 1:]
            return super().forward(x_BLc.transpose(1, 2)).transpose(1, 2), x_BLc[:, length:]
        if length == 1:
            x = torch.cat((tail, x_BLc), dim=1)
            back_W1 = torch.arange(width - 1, -1, -1, device=x.device)[:, None]
            seen = x.masked_fill(tokens.index_BR[:, -1, None, None] < back_W1, 0)
            tail = torch.where(real_BL[..., None], x[:, 1:], tail)
            return hold_gradients((seen * self.weight[:, 0].t()).sum(1, keepdim=True)), tail
        # Real tokens first, so that those before a token are its neighbours, also behind padding.
        x = torch.cat((tail, _take(x_BLc, tokens.order_BL)), dim=1)
        index_BL = tokens.index_BR[:, tokens.num_before :].gather(1, tokens.order_BL)
        out = torch.zeros_like(x_BLc)
        for back in range(width):
            weighted = x[:, width - 1 - back :][:, :length] * self.weight[:, 0, width - 1 - back]
            out = out + weighted.masked_fill((index_BL < back)[..., None], 0)
        out = hold_gradients(out)
        last = real_BL.sum(-1, keepdim=True) + torch.arange(width - 1, device=x.device)
        return _take(out, (real_BL.cumsum(-1) - 1).clamp(min=0)), _take(x, last)


def _take(x_BLc: Tensor, column: Tensor) -> Tensor:
    """Return the tokens at these columns [B, n] of each sequence."""
    return x_BLc.gather(1, column[..., None].expand(-1, -1, x_BLc.shape[-1]))
