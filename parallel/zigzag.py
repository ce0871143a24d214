"""A micro-batch rearranged for attention kernels that need every document in zigzag over the context ranks.

D counts full documents here, and E the tokens of the one sequence that they make, with their padding.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_sse.parallel.device import to_device
from megatron_sse.parallel.routes import Route, make_route
from megatron_sse.parallel.sharding import ContextShard


@dataclass(kw_only=True, eq=False)
class ZigzagLayout(PackedSeqParams):
    """The rearranged micro-batch, in the form that Transformer Engine takes.

    Sequences of one document each keep their shape [L, B]. Packed documents become one sequence, B = 1: each document
    is padded and cut into 2 * ranks equal chunks, and rank r holds its chunks r and 2 * ranks - 1 - r.

    Attributes:
        position_BL: int64 [B, L], position inside the document; positions continue through the padding.
        documents: real and padded lengths of the documents on all ranks; None where each sequence is one.
        route: from the rows of the original layout's hidden states [L, B] to those of this one.
    """

    # Not "thd": Megatron's attention would take its packed path. `documents` describes the packing to the kernel alone.
    qkv_format: str = "sbhd"
    position_BL: Tensor
    documents: PackedSeqParams | None
    route: Route

    @classmethod
    def from_starts(
        cls, starts_BE: np.ndarray, shard: ContextShard, tensor_rank: int, tensor_size: int, device: torch.device | str
    ) -> ZigzagLayout:
        """Make the layout for documents that start where `starts_BE` (bool) is True.

        The first token of each sequence has to start a document. Under sequence parallelism the route covers all ranks
        of the tensor and context groups: rank `tensor_rank` of `tensor_size` holds a part of its context rank's rows.
        Otherwise tensor_size is 1.
        """
        batch_size, length = starts_BE.shape
        before = _rows(shard, batch_size, length)
        documents = None
        if starts_BE.sum() == batch_size and length % (2 * shard.size) == 0:
            zigzag = ContextShard(shard.rank, shard.size, zigzag=True)
            after = _rows(zigzag, batch_size, length)
            position_BL = np.tile(zigzag.columns(length), (batch_size, 1))
        else:
            lengths_D, padded_D = _padded_lengths(starts_BE, shard.size, tensor_size)
            after, positions = _document_rows(lengths_D, padded_D, shard.size)
            position_BL = positions[shard.rank][None]
            documents = _describe(lengths_D, padded_D, device)
        rank = shard.rank * tensor_size + tensor_rank
        route = make_route(_split(before, tensor_size), _split(after, tensor_size), rank, device)
        return cls(position_BL=to_device(position_BL, device), documents=documents, route=route)


def _rows(shard: ContextShard, batch_size: int, length: int) -> list[np.ndarray]:
    """Return, per rank, the token (b * E + e) in each row of its hidden states [L, B]."""
    token_EB = np.arange(batch_size) * length + shard.all_columns(length)[:, None]
    return [part.reshape(-1) for part in np.split(token_EB, shard.size)]


def _split(parts: list[np.ndarray], tensor_size: int) -> list[np.ndarray]:
    return [own for part in parts for own in np.split(part, tensor_size)]


def _padded_lengths(starts_BE: np.ndarray, size: int, tensor_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the real and the padded lengths of the documents [D].

    A document of padding alone is appended where any document is padded, and where a rank's rows would not divide by
    tensor_size. For example, lengths 5 and 3 on 2 ranks: each is padded to a multiple of 4, to 8 and 4, and
    with the appended document the result is real 5 3 0, padded 8 4 4.
    """
    lengths_D = np.diff(np.append(np.flatnonzero(starts_BE), starts_BE.size))
    pairs_D = -(-lengths_D // (2 * size))  # tokens of each of its 2 * size chunks; a rank holds a pair of chunks
    fill = -2 * pairs_D.sum() % tensor_size  # rows missing on each rank to a multiple of tensor_size
    if fill == 0 and np.array_equal(lengths_D, 2 * size * pairs_D):
        return lengths_D, lengths_D
    # Up to 2.17, Transformer Engine sees padding only if it comes before the last document: hence the appended one.
    tail = next(pairs for pairs in range(1, tensor_size + 1) if (2 * pairs - fill) % tensor_size == 0)
    return np.append(lengths_D, 0), 2 * size * np.append(pairs_D, tail)


def _document_rows(lengths_D: np.ndarray, padded_D: np.ndarray, size: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Return, per rank, the token (-1 for padding) and the position in its document of each row.

    The example of _padded_lengths, real 5 3 0 and padded 8 4 4 on 2 ranks:
        token  0 1 2 3 4 - - - | 5 6 7 - | - - - -
        chunk  0 0 1 1 2 2 3 3 | 0 1 2 3 | 0 1 2 3
        owner  0 0 1 1 1 1 0 0 | 0 1 1 0 | 0 1 1 0
    so rank 0 holds the tokens 0 1 - - 5 - - - and rank 1 holds 2 3 4 - 6 7 - -.
    """
    within_E = np.arange(padded_D.sum()) - np.repeat(np.cumsum(padded_D) - padded_D, padded_D)
    token_E = within_E + np.repeat(np.cumsum(lengths_D) - lengths_D, padded_D)
    token_E[within_E >= np.repeat(lengths_D, padded_D)] = -1
    chunk_E = within_E // np.repeat(padded_D // (2 * size), padded_D)
    owner_E = np.minimum(chunk_E, 2 * size - 1 - chunk_E)
    own = [owner_E == rank for rank in range(size)]
    return [token_E[mask] for mask in own], [within_E[mask] for mask in own]


def _describe(lengths_D: np.ndarray, padded_D: np.ndarray, device: torch.device | str) -> PackedSeqParams:
    offsets, padded = (
        to_device(np.append(0, np.cumsum(sizes)).astype(np.int32), device) for sizes in (lengths_D, padded_D)
    )
    # Passing the same tensor twice tells Transformer Engine that nothing is padded.
    padded = offsets if padded_D is lengths_D else padded
    longest = int(padded_D.max())
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=offsets,
        cu_seqlens_kv=offsets,
        cu_seqlens_q_padded=padded,
        cu_seqlens_kv_padded=padded,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )
