"""Documents that start from the end of another one: a prompt, computed once, and the answers to it.

A document that others start from is their parent. States, convolutions, positions and attention of a child go on where
its parent ends, so that it is what the parent's tokens and its own would be as one document. A parent has no parent.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar, overload

import numpy as np
import torch
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_sse.kernels import BankInputs, BankOutputs, Routes, short_convolution, sse_attention
from megatron_sse.parallel.device import to_device
from megatron_sse.parallel.layout import TokenLayout

Halved = TypeVar("Halved", BankInputs, Routes, Tensor, BankInputs | None, Routes | None)


@dataclass(frozen=True)
class _Pass:
    """Documents that are computed at once, a span for each: offsets_Y1 and span_T over their tokens, one document after
    the other."""

    offsets_Y1: Tensor
    span_T: Tensor

    @classmethod
    def of(cls, sizes_Y: np.ndarray, device: torch.device) -> _Pass:
        offsets_Y1, span_T = np.append(0, sizes_Y.cumsum()), np.repeat(np.arange(len(sizes_Y)), sizes_Y)
        return cls(to_device(offsets_Y1, device), to_device(span_T, device))


@dataclass(kw_only=True, eq=False)
class SharedPrefixLayout(TokenLayout):
    """Documents of which some start from the end of another one in the same sequence; without context parallelism.

    position_BL counts the parent's tokens, too.

    Attributes:
        num_first: tokens of all parents.
        order_T, back_T: int64, the flat tokens with those of the parents first, and where each token is among these.
        parents, others: the documents of both parts.
        parent_Y: int64, of each of the others the number of its parent, 0 where it has none. has_parent_Y: bool.
        parent_end_D: int64, the flat token behind each document's parent; 0 where it has none.
        parent_id_BL: int64, like document_id_BL, but of the token's parent; -1 where it has none.
        copies_BL: int64, in how many documents a token would be if they shared nothing; 0 for padding.
    """

    num_first: int
    order_T: Tensor
    back_T: Tensor
    parents: _Pass
    others: _Pass
    parent_Y: Tensor
    has_parent_Y: Tensor
    parent_end_D: Tensor
    parent_id_BL: Tensor
    copies_BL: Tensor

    @classmethod
    def of(cls, plain: TokenLayout, parent_BE: np.ndarray) -> SharedPrefixLayout:
        """Return the layout in which some documents of `plain` have parents.

        parent_BE: int64, where a document starts, the column of its sequence in which its parent starts, which is on
        its left; -1 elsewhere, and for documents without a parent. At least one has one.
        """
        assert plain.shard.size == 1 and (parent_BE >= 0).any()
        device, (batch_size, length) = plain.column_L.device, parent_BE.shape
        # One sequence of a prompt of 3 tokens, answers of 2 and 1 to it, and a document of 2: starts 1 0 0 1 0 1 1 0,
        # parent -1 . . 0 . 0 -1 . and sizes_D 3 2 1 2, so parent_D -1 0 0 -1, and all tokens are in order already.
        starts_T = plain.starts_BE.ravel()
        first_D = np.flatnonzero(starts_T)
        sizes_D = np.diff(np.append(first_D, starts_T.size))
        document_T = np.repeat(np.arange(len(first_D)), sizes_D)
        column_D = parent_BE.ravel()[first_D]
        has_parent_D = column_D >= 0
        parent_D = np.where(has_parent_D, document_T[first_D // length * length + column_D.clip(0)], -1)
        num_children_D = np.bincount(parent_D[has_parent_D], minlength=len(first_D))
        is_parent_D = num_children_D > 0
        assert not (is_parent_D & has_parent_D).any()

        order_T = np.argsort(~is_parent_D[document_T], kind="stable")
        number_D = is_parent_D.cumsum() - 1
        past_D = np.where(has_parent_D, sizes_D[parent_D], 0)
        # Documents are numbered in each sequence, and parents are in the sequence of their children.
        id_BE = plain.starts_BE.cumsum(1) - 1
        parent_id_D = np.where(has_parent_D, id_BE.ravel()[first_D] - np.arange(len(first_D)) + parent_D, -1)

        def by_token(x_D: np.ndarray) -> Tensor:
            return to_device(x_D[document_T].reshape(batch_size, length), device)

        copies_BL = by_token(num_children_D.clip(1))
        values = {entry.name: getattr(plain, entry.name) for entry in fields(plain)}
        return cls(
            **values | {"position_BL": plain.position_BL + by_token(past_D)},
            num_first=int(sizes_D[is_parent_D].sum()),
            order_T=to_device(order_T, device),
            back_T=to_device(np.argsort(order_T), device),
            parents=_Pass.of(sizes_D[is_parent_D], device),
            others=_Pass.of(sizes_D[~is_parent_D], device),
            parent_Y=to_device(np.where(has_parent_D, number_D[parent_D], 0)[~is_parent_D], device),
            has_parent_Y=to_device(has_parent_D[~is_parent_D], device),
            parent_end_D=to_device(np.where(has_parent_D, (first_D + sizes_D)[parent_D], 0), device),
            parent_id_BL=by_token(parent_id_D),
            copies_BL=copies_BL if plain.real_BL is None else copies_BL * plain.real_BL,
        )

    @property
    def count_BL(self) -> Tensor:
        return self.copies_BL

    def attend_banks(
        self,
        layer_number: int,
        shared: BankInputs,
        sparse: BankInputs | None,
        v_THV: Tensor,
        routes: Routes | None,
        *,
        exchange: Any,
        group: ProcessGroup,
        **options: Any,
    ) -> BankOutputs:
        """Run the banks over the parents, then over the other documents, from their parents' final states."""

        parts = zip(self._halves(shared), self._halves(sparse), self._halves(v_THV), self._halves(routes), strict=True)
        of_parents, of_others = parts
        first = sse_attention(*of_parents, self.parents.offsets_Y1, self.parents.span_T, **options)
        assert first.final_YAHKV is not None
        # Indexed, since the gradient is then summed in a fixed order; selected, since a state may be inf or nan.
        initial_YAHKV = first.final_YAHKV[self.parent_Y].masked_fill(~self.has_parent_Y[:, None, None, None, None], 0)
        packing = self.others.offsets_Y1, self.others.span_T
        second = sse_attention(*of_others, *packing, initial_YAHKV=initial_YAHKV, **options)

        def join(x: Tensor, y: Tensor) -> Tensor:
            return _Permute.apply(torch.cat((x, y)), self.back_T, self.order_T)

        picked_TPHV = None
        if first.picked_TPHV is not None and second.picked_TPHV is not None:
            picked_TPHV = join(first.picked_TPHV, second.picked_TPHV)
        return BankOutputs(join(first.shared_THV, second.shared_THV), picked_TPHV, second.final_YAHKV)

    @overload
    def _halves(self, x: None) -> tuple[None, None]: ...
    @overload
    def _halves(self, x: Halved) -> tuple[Halved, Halved]: ...
    def _halves(self, x: Any) -> tuple[Any, Any]:
        """Return the rows of the parents' tokens and those of the others', of a tensor or of each tensor in `x`."""
        if x is None:
            return None, None
        if isinstance(x, BankInputs):
            first, second = zip(*map(self._halves, x.tensors), strict=True)
            return BankInputs(*first), BankInputs(*second)
        if isinstance(x, Routes):
            halves = zip(*map(self._halves, (x.prob_TN, x.bank_TP, x.weight_TP)), strict=True)
            of_parents, of_others = (replace(x, prob_TN=p, bank_TP=b, weight_TP=w) for p, b, w in halves)
            return of_parents, of_others
        return _Permute.apply(x, self.order_T, self.back_T).tensor_split((self.num_first,))

    def convolve(
        self,
        layer_number: int,
        name: str,
        x_LBc: Tensor,
        weight_cW: Tensor,
        group: ProcessGroup,
        tensor_group: ProcessGroup | None = None,
    ) -> Tensor:
        """Convolve each document behind the last tokens of its parent. Every rank of a tensor group computes all."""
        if tensor_group is not None:
            x_LBc = gather_from_sequence_parallel_region(x_LBc, group=tensor_group)
        x_Tc, width = x_LBc.transpose(0, 1).flatten(0, 1), weight_cW.shape[1] - 1
        # As in inference.layers.Tail: with a width of 2 and the documents a b | c, x_Rc is - - a b - - c.
        before_D = torch.arange(self.num_documents, device=x_Tc.device) * width
        back_W = torch.arange(width, device=x_Tc.device)
        row_T = torch.arange(len(x_Tc), device=x_Tc.device) + before_D[self.document_T] + width
        tail = ((self.offsets_D1[:-1] + before_D)[:, None] + back_W).flatten()
        # What lies before a parent's first token does not count: positions say so.
        source = (self.parent_end_D[:, None] - width + back_W).clamp(min=0).flatten()
        x_Rc = x_Tc.new_zeros(len(x_Tc) + len(tail), x_Tc.shape[1])
        x_Rc = x_Rc.index_copy(0, row_T, x_Tc).index_copy(0, tail, x_Tc[source])
        position_R = torch.zeros_like(x_Rc[:, 0], dtype=torch.int64).index_copy(0, row_T, self.position_BL.flatten())
        out_Tc = short_convolution(x_Rc, weight_cW, position_R)[row_T]
        out_LBc = out_Tc.unflatten(0, (self.batch_size, self.length)).transpose(0, 1)
        return out_LBc if tensor_group is None else out_LBc.chunk(tensor_group.size())[tensor_group.rank()]

    def _attend_pieces(
        self, q_BHLK: Tensor, k_BHRK: Tensor, v_BHRK: Tensor, window: int | None, scale: float | None
    ) -> Tensor:
        # A child's keys are in two places, which a piece cannot say.
        return self._attend_masked(q_BHLK, k_BHRK, v_BHRK, window, scale, dropout=0.0)

    def _mask(self, window: int | None, queries: slice) -> Tensor:
        """Return which keys each of these queries sees, bool [B, 1, queries, E]: of its document and of its parent."""
        seen = self.column_L[queries, None] >= self.key_column_E
        own, parent = (x_BL[:, queries, None] for x_BL in (self.document_id_BL, self.parent_id_BL))
        key_id_B1E = self.key_document_id_BE[:, None]
        seen = seen & ((own == key_id_B1E) | (parent == key_id_B1E))
        if window is not None:
            # Between parent and child may be other children: positions count, not columns.
            seen = seen & (self.position_BL[:, queries, None] < self.position_BL[:, None] + window)
        return seen[:, None]


class _Permute(torch.autograd.Function):
    """Rows in another order; the gradient takes them back, where that of an index would sum."""

    @staticmethod
    def forward(ctx, x, order, back):
        ctx.save_for_backward(back)
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx, grad):
        (back,) = ctx.saved_tensors
        return grad.index_select(0, back), None, None
