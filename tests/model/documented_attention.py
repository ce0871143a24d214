"""Transformer Engine's DotProductAttention by its documentation, in plain torch for any number of ranks."""

from itertools import pairwise
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_sse.model.attention import DocumentArguments
from megatron_sse.parallel.sharding import ContextShard

# Output in padding rows; callers must not depend on it.
GARBAGE = 1e3


class DocumentedAttention(torch.nn.Module):
    """An attention with the signature of Megatron-Core's TEDotProductAttention; `calls` records its calls."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ):
        super().__init__()
        self.window = None if config.window_size is None else config.window_size[0] + 1
        self.cp_comm_type = cp_comm_type
        self.group = pg_collection.cp if pg_collection is not None else None
        self.rank, self.size = (self.group.rank(), self.group.size()) if self.group is not None else (0, 1)
        self.calls: list[dict[str, Any]] = []

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType,
        packed_seq_params: PackedSeqParams | None,
    ) -> Tensor:
        """Attend within sequences (sbhd) or documents (thd, padded by cu_seqlens_q_padded), both in zigzag order."""
        assert attention_mask is None
        self.calls.append({"shape": query.shape, "mask": attn_mask_type, "documents": packed_seq_params})
        qkv = (query, key, value)
        if self.size > 1:
            qkv = tuple(gather_from_sequence_parallel_region(x, group=self.group) for x in qkv)
        if packed_seq_params is None:
            return self._sequences(*qkv)
        return self._documents(*qkv, packed_seq_params)

    def _sequences(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        shard = ContextShard(self.rank, self.size, zigzag=True)
        order = torch.from_numpy(shard.all_columns(len(q)).argsort())
        q, k, v = (x[order] for x in (q, k, v))
        out = torch.stack([self._attend(q[:, b], k[:, b], v[:, b]) for b in range(q.shape[1])], dim=1)
        return out[torch.from_numpy(shard.columns(len(q)))]

    def _documents(self, q: Tensor, k: Tensor, v: Tensor, documents: PackedSeqParams) -> Tensor:
        offsets = documents.cu_seqlens_q.tolist()
        padded = offsets if documents.cu_seqlens_q_padded is None else documents.cu_seqlens_q_padded.tolist()
        assert len(q) == padded[-1]
        parts = []
        for (first, end), (start, stop) in zip(pairwise(offsets), pairwise(padded), strict=True):
            number = end - first
            whole = [self._document(x, start, stop)[:number] for x in (q, k, v)]
            out = self._attend(*whole)
            out = torch.cat((out, out.new_full((stop - start - number, out.shape[1]), GARBAGE)))
            chunks = out.chunk(2 * self.size) if self.size > 1 else [out[:0], out]
            parts += [chunks[self.rank], chunks[2 * self.size - 1 - self.rank]]
        return torch.cat(parts)

    def _document(self, x: Tensor, start: int, stop: int) -> Tensor:
        """Return tokens start to stop of the padded documents, in order, from all ranks' parts."""
        if self.size == 1:
            return x[start:stop]
        assert start % (2 * self.size) == 0 and stop % (2 * self.size) == 0
        parts = [part[start // self.size : stop // self.size].chunk(2) for part in x.chunk(self.size)]
        if stop == start:
            return x[:0]
        return torch.cat([first for first, _ in parts] + [second for _, second in reversed(parts)])

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend within one document: q [n, heads, head dim] to [n, heads * head dim]."""
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) * q.shape[-1] ** -0.5
        distance = torch.arange(len(q))[:, None] - torch.arange(len(q))
        seen = distance >= 0 if self.window is None else (distance >= 0) & (distance < self.window)
        return torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v).flatten(1)


class DocumentedTEAttention(DocumentArguments, DocumentedAttention):
    """The class that the model uses where Transformer Engine is installed, on top of the documented one."""
