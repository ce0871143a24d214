"""Which tokens of a micro-batch belong to which document, on one context rank.

D counts fragments here: the parts of documents that lie in one slot, which are the documents without context
parallelism. `document_id` is the number of the full document instead. Next to F, L counts the tokens of one slot.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from megatron_sse.kernels import BankInputs, BankOutputs, Edges, Routes, sse_attention
from megatron_sse.kernels.attention import Piece, attend_pieces
from megatron_sse.kernels.segments import Exchange
from megatron_sse.parallel.device import to_device
from megatron_sse.parallel.halo import convolve_slots
from megatron_sse.parallel.pieces import cut_pieces
from megatron_sse.parallel.sharding import MASKED_PAIRS, ContextShard
from megatron_sse.parallel.zigzag import ZigzagLayout


@dataclass(frozen=True)
class SlotEdges:
    """Which documents cross the edges of this rank's slots, per slot and sequence, [F, B].

    span: int64, the span of the slot. continues: bool, its first document began in an earlier slot. carries: bool, one
    document that began earlier fills the slot, so that the state which enters the slot also leaves it.
    """

    span_FB: Tensor
    continues_FB: Tensor
    carries_FB: Tensor


@dataclass(kw_only=True, eq=False)
class TokenLayout(PackedSeqParams):
    """Document metadata, made once per micro-batch on the host and passed to every layer.

    It travels as Megatron's `packed_seq_params`, the one argument that reaches each attention module.

    Attributes:
        shard: which part of the sequences this is.
        starts_BE: bool, on the host, where documents start in the full sequences.
        in_zigzag: whether every document is in zigzag order over several ranks, which is so when the shard is and each
            sequence is one document.
        batch_size, length, num_documents: B, L and D.
        max_document: tokens of the longest fragment.
        offsets_D1: int64 [D + 1], fragment d holds the flat tokens offsets[d] to offsets[d + 1].
        document_T: int64 [T], the fragment of each flat token.
        offsets_Y1: int64 [Y + 1], the spans that a state of each bank goes through: all flat tokens at once, or the
            slots of each sequence under context parallelism. Their number does not depend on the documents.
        span_T: int64 [T], the span of each flat token.
        position_BL: int64 [B, L], position inside the full document, also where it began on another rank.
        edges: which documents cross the edges of the slots; None without context parallelism.
        column_L: int64 [L], position in the sequence of each token; key_column_E, for all ranks one after the other.
        document_id_BL, key_document_id_BE: int64, number of the full document in its sequence, for own tokens and for
            all ranks'.
        real_BL: bool [B, L], False for padding; None where every token is real.
        layer_loss_scale: gradient of the losses that layers add themselves (the balance loss) before their
            coefficient; the trainer sets it, None leaves them out.
    """

    # Megatron's own attention would otherwise flatten the batch and read cu_seqlens.
    qkv_format: str = "sbhd"
    shard: ContextShard
    starts_BE: np.ndarray
    in_zigzag: bool
    batch_size: int
    length: int
    num_documents: int
    max_document: int
    offsets_D1: Tensor
    document_T: Tensor
    offsets_Y1: Tensor
    span_T: Tensor
    position_BL: Tensor
    edges: SlotEdges | None
    column_L: Tensor
    key_column_E: Tensor
    document_id_BL: Tensor
    key_document_id_BE: Tensor
    real_BL: Tensor | None = None
    layer_loss_scale: Tensor | None = None
    _zigzag: ZigzagLayout | None = None
    _pieces: dict[int | None, list[Piece]] = field(default_factory=dict)
    # Whether layers compute losses of their own.
    has_layer_losses: ClassVar[bool] = True

    @classmethod
    def from_starts(
        cls,
        starts_BE: np.ndarray,
        real_BE: np.ndarray | None = None,
        device: torch.device | str = "cpu",
        shard: ContextShard | None = None,
    ) -> TokenLayout:
        """Make the layout of one context rank's part of a batch whose documents start where `starts_BE` (bool) is True.

        Every sequence starts a document, whether marked or not. Sizes stay on the host and tensors are copied
        asynchronously, so nothing waits for the device. Raises ValueError on wrong shapes.
        """
        if starts_BE.ndim != 2 or starts_BE.size == 0:
            raise ValueError(f"starts must be a non-empty [B, E] array, got shape {starts_BE.shape}")
        if real_BE is not None and real_BE.shape != starts_BE.shape:
            raise ValueError(f"real has shape {real_BE.shape}, starts {starts_BE.shape}")
        shard = shard or ContextShard()
        starts_BE = starts_BE.astype(bool)
        starts_BE[:, 0] = True
        # The example below: one sequence of 8 tokens with documents at 0 and 5, on rank 1 of 2 in zigzag.
        # starts 1 0 0 0 0 1 0 0, id 0 0 0 0 0 1 1 1, first 0 0 0 0 0 5 5 5, position 0 1 2 3 4 0 1 2.
        document_id_BE = np.cumsum(starts_BE, axis=1) - 1
        first_BE = np.maximum.accumulate(np.where(starts_BE, np.arange(starts_BE.shape[1]), 0), axis=1)
        position_BE = np.arange(starts_BE.shape[1]) - first_BE

        column_L, key_column_E = (columns(starts_BE.shape[1]) for columns in (shard.columns, shard.all_columns))
        # A slot cuts documents into fragments: a fragment starts where a document or a slot does.
        # Rank 1 holds columns 2 3 | 4 5: continues 1 | 1, starts 1 0 | 1 1, so fragments 0 0 | 1 2 and offsets 0 2 3 4.
        starts_BFL = starts_BE[:, column_L].reshape(len(starts_BE), shard.num_slots, -1).copy()
        continues_BF = ~starts_BFL[:, :, 0]
        starts_BFL[:, :, 0] = True
        offsets_D1 = np.append(np.flatnonzero(starts_BFL), starts_BFL.size)
        sizes_D = np.diff(offsets_D1)
        document_T = np.repeat(np.arange(len(sizes_D)), sizes_D)
        document_BFL = document_T.reshape(starts_BFL.shape)
        # First fragments 0 | 1, last ones 0 | 2: one document that began earlier fills the first slot alone (carries).
        # States that cross ranks enter and leave slots, so each is a span of its own; in between, documents are resets.
        span_BF = np.arange(continues_BF.size).reshape(continues_BF.shape) if shard.size > 1 else np.zeros((1, 1), int)
        edges = (span_BF, continues_BF, continues_BF & (document_BFL[:, :, 0] == document_BFL[:, :, -1]))
        return cls(
            shard=shard,
            starts_BE=starts_BE,
            in_zigzag=shard.zigzag and shard.size > 1 and int(starts_BE.sum()) == len(starts_BE),
            batch_size=len(starts_BE),
            length=len(column_L),
            num_documents=len(sizes_D),
            max_document=int(sizes_D.max()),
            offsets_D1=to_device(offsets_D1, device),
            document_T=to_device(document_T, device),
            offsets_Y1=to_device(np.linspace(0, document_T.size, span_BF.size + 1, dtype=np.int64), device),
            span_T=to_device(np.repeat(span_BF.ravel(), document_T.size // span_BF.size), device),
            position_BL=to_device(position_BE[:, column_L], device),
            edges=SlotEdges(*(to_device(edge.T, device) for edge in edges)) if shard.size > 1 else None,
            column_L=to_device(column_L, device),
            key_column_E=to_device(key_column_E, device),
            document_id_BL=to_device(document_id_BE[:, column_L], device),
            key_document_id_BE=to_device(document_id_BE[:, key_column_E], device),
            real_BL=None if real_BE is None else to_device(real_BE[:, column_L].astype(bool), device),
        )

    @property
    def count_BL(self) -> Tensor:
        """How often each token counts in means over tokens, [B, L]: once, and padding not at all."""
        return torch.ones_like(self.position_BL) if self.real_BL is None else self.real_BL

    def attend_banks(
        self,
        layer_number: int,
        shared: BankInputs,
        sparse: BankInputs | None,
        v_THV: Tensor,
        routes: Routes | None,
        *,
        exchange: Exchange,
        group: ProcessGroup,
        **options: Any,
    ) -> BankOutputs:
        """Run the banks of an SSE layer over the documents, each from empty states.

        Args:
            layer_number, group: of a layer and its context ranks, for layouts that keep states.
            shared, sparse, v_THV, routes, options: as for kernels.sse_attention.
            exchange: starts to hand states from slot to slot, see kernels.Edges.
        """
        edges = None
        if self.edges is not None:
            edges = Edges(self.edges.span_FB, self.edges.continues_FB, self.edges.carries_FB, exchange)
        packing = self.offsets_Y1, self.span_T, self.document_T
        return sse_attention(shared, sparse, v_THV, routes, *packing, edges=edges, **options)

    def convolve(
        self,
        layer_number: int,
        name: str,
        x_LBc: Tensor,
        weight_cW: Tensor,
        group: ProcessGroup,
        tensor_group: ProcessGroup | None = None,
    ) -> Tensor:
        """Apply a short convolution inside the documents; what looks back past a slot comes from other ranks.

        Args:
            layer_number, name: of the layer and of its convolution, for layouts that keep tokens.
            x_LBc: this rank's tokens.
            group: the ranks among which the sequences are split.
            tensor_group: given where tensor ranks hold parts of L (sequence parallelism).
        """
        chain, position_BL, num_slots = self.shard.chain, self.position_BL, self.shard.num_slots
        # Each tensor rank's part counts as a slot, and the ranks are those of the tensor and context groups together.
        if tensor_group is not None:
            chain, num_slots = self.shard.chain_of_parts(tensor_group.size()), 1
            position_BL = position_BL.chunk(tensor_group.size(), dim=1)[tensor_group.rank()]
        x_FBLc = x_LBc.unflatten(0, (num_slots, -1)).transpose(1, 2)
        position_FBL = position_BL.unflatten(1, (num_slots, -1)).transpose(0, 1)
        out_FBLc = convolve_slots(x_FBLc, weight_cW, position_FBL, chain, group)
        return out_FBLc.transpose(1, 2).flatten(0, 1)

    def attend(
        self,
        layer_number: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        window: int | None,
        scale: float | None,
        dropout: float,
        group: ProcessGroup | None,
    ) -> Tensor:
        """Attend causally inside documents, with torch's kernels.

        Under context parallelism each rank gathers the keys and values of all; exact for any layout of the tokens.

        Args:
            layer_number: of the layer, for layouts that keep keys and values.
            query: [L, B, heads, head dim]; key and value have no more heads.
            window: tokens that a token sees, its own included; None for all before it.
            scale: of the scores; None for 1 / sqrt(head dim).
            group: the context ranks.

        Returns:
            [L, B, heads * head dim].
        """
        if self.shard.size > 1:
            key, value = (gather_from_sequence_parallel_region(x, group=group) for x in (key, value))
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        if q.is_cpu and not dropout:
            out = self._attend_pieces(q, k, v, window, scale)
        else:
            out = self._attend_masked(q, k, v, window, scale, dropout)
        return out.permute(2, 0, 1, 3).flatten(-2)

    def _attend_pieces(
        self, q_BHLK: Tensor, k_BHRK: Tensor, v_BHRK: Tensor, window: int | None, scale: float | None
    ) -> Tensor:
        if self.shard.zigzag:
            order_R = self.key_column_E.argsort()
            k_BHRK, v_BHRK = (x.index_select(2, order_R) for x in (k_BHRK, v_BHRK))
        if window not in self._pieces:
            self._pieces[window] = cut_pieces(self.starts_BE, self.shard, window)
        return attend_pieces(q_BHLK, k_BHRK, v_BHRK, self._pieces[window], window, scale)

    def _attend_masked(
        self, q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float | None, dropout: float
    ) -> Tensor:
        """Attend where kernels for pieces are missing: on GPUs without Transformer Engine, and with dropout."""
        # A window that holds all tokens hides none.
        narrow = window is not None and window < self.length
        masked = self.shard.size > 1 or self.num_documents > self.batch_size or narrow

        def attend_some(q: Tensor, k: Tensor, v: Tensor, first: int = 0) -> Tensor:
            mask = self._mask(window, slice(first, first + q.shape[2])) if masked else None
            return scaled_dot_product_attention(
                q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scale, enable_gqa=True
            )

        most = max(1, MASKED_PAIRS // self.key_document_id_BE.numel())
        if masked and self.length > most:
            # Autograd would keep the masks of all chunks: each is made again in the backward pass.
            again = partial(checkpoint, attend_some, use_reentrant=False, preserve_rng_state=dropout > 0)
            parts = [again(part, k, v, most * number) for number, part in enumerate(q.split(most, dim=2))]
            return torch.cat(parts, dim=2)
        return attend_some(q, k, v)

    def _mask(self, window: int | None, queries: slice) -> Tensor:
        """Return which keys each of these queries sees, bool [B, 1, queries, E]."""
        # Columns, not indices: neighbouring tokens of a rank may be far apart in the sequence (zigzag).
        column_L1 = self.column_L[queries, None]
        seen = column_L1 >= self.key_column_E
        if window is not None:
            seen = seen & (column_L1 < self.key_column_E + window)
        return (seen & (self.document_id_BL[:, queries, None] == self.key_document_id_BE[:, None]))[:, None]

    @property
    def documents(self) -> PackedSeqParams | None:
        """The fragments in Transformer Engine's form; None where each sequence is one document, taken as it is."""
        # In the packed form cuDNN's attention needs Hopper; for single documents it would gain nothing.
        if self.in_zigzag or (self.shard.size == 1 and self.num_documents == self.batch_size):
            return None
        offsets = self.offsets_D1.int()
        return PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=offsets,
            cu_seqlens_kv=offsets,
            max_seqlen_q=self.max_document,
            max_seqlen_kv=self.max_document,
        )

    def to_zigzag(self, tensor_rank: int = 0, tensor_size: int = 1) -> ZigzagLayout:
        """Return the layout of the same micro-batch with every document in zigzag over the context ranks.

        The first call makes it and later calls return the same object, so every layer has to pass the same arguments.

        Args:
            tensor_rank, tensor_size: as in ZigzagLayout.from_starts.
        """
        if self._zigzag is None:
            self._zigzag = ZigzagLayout.from_starts(
                self.starts_BE, self.shard, tensor_rank, tensor_size, self.column_L.device
            )
        return self._zigzag
