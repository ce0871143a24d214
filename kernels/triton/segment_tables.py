"""The segments cut into chunks and pieces in one launch, as segments.cut and triton_rows.make_rows do, bit for bit."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_sse.chunking import CHUNK_SIZE
from megatron_sse.kernels.resets import PieceResets
from megatron_sse.kernels.segments import Pieces
from megatron_sse.kernels.triton.row_tables import load_pick

OPTIONS = {"num_warps": 4}
BLOCK = 128


@triton.jit
def _run_at(run_ptr, position, num_rows, mask):
    """Load how many documents have started inside segments before a position."""
    position = tl.minimum(position, num_rows)
    return tl.load(run_ptr + position - 1, mask=mask & (position > 0), other=0)


@triton.jit
def _cut_segment(
    segment,
    offset,
    end_of_segment,
    before,
    count,
    run_ptr,
    start_ptr,
    end_ptr,
    segment_ptr,
    step_ptr,
    inside_ptr,
    before_ptr,
    num_rows,
    num_pieces,
    is_last,
    size,
    HAS_RESETS: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write a segment's pieces of `size` rows; the last segment also writes those that are not used."""
    last = tl.where(is_last, num_pieces, before + count)
    for first in range(before, last, BLOCK):
        piece = first + tl.arange(0, BLOCK)
        mask = piece < last
        start = offset + (piece - before).to(tl.int64) * size
        end = tl.minimum(start + size, end_of_segment)
        tl.store(start_ptr + piece, start, mask=mask)
        tl.store(end_ptr + piece, end, mask=mask)
        if WHOLE:
            tl.store(segment_ptr + piece, tl.zeros_like(start) + segment, mask=mask)
            tl.store(step_ptr + piece, (piece - before).to(tl.int64), mask=mask)
            if HAS_RESETS:
                at_start = _run_at(run_ptr, start, num_rows, mask)
                tl.store(inside_ptr + piece, _run_at(run_ptr, end, num_rows, mask) > at_start, mask=mask)
                at_offset = _run_at(run_ptr, offset, num_rows, offset >= 0)
                tl.store(before_ptr + piece, at_start > at_offset, mask=mask)


@triton.jit(do_not_specialize=["num_tokens", "num_rows", "num_spans", "num_chunks", "num_pieces", "piece_size"])
def cut_segments_kernel(
    offset_ptr,
    span_offset_ptr,
    document_ptr,
    order_ptr,
    run_ptr,
    spoiled_ptr,
    chunk_start_ptr,
    chunk_end_ptr,
    piece_start_ptr,
    piece_end_ptr,
    piece_segment_ptr,
    piece_step_ptr,
    piece_inside_ptr,
    piece_before_ptr,
    chunk_ptr,
    first_ptr,
    last_ptr,
    empty_ptr,
    inside_ptr,
    emptied_ptr,
    spoiled_segment_ptr,
    num_tokens,
    num_rows,
    num_spans,
    num_chunks,
    num_pieces,
    piece_size,
    N: tl.constexpr,
    P: tl.constexpr,
    CHUNK: tl.constexpr,
    HAS_RESETS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the chunks and pieces of a segment, and what is known of all of it; program (segment)."""
    segment, num_segments = tl.program_id(0), tl.num_programs(0)
    offset, end = tl.load(offset_ptr + segment), tl.load(offset_ptr + segment + 1)
    # The chunks and pieces of the segments before.
    chunks_before = tl.zeros([BLOCK], tl.int32)
    pieces_before = tl.zeros([BLOCK], tl.int32)
    for first in range(0, segment, BLOCK):
        other = first + tl.arange(0, BLOCK)
        size = tl.load(offset_ptr + other + 1, mask=other < segment, other=0)
        size -= tl.load(offset_ptr + other, mask=other < segment, other=0)
        chunks_before += ((size + CHUNK - 1) // CHUNK).to(tl.int32)
        pieces_before += ((size + piece_size - 1) // piece_size).to(tl.int32)
    first_chunk, first_piece = tl.sum(chunks_before, axis=0), tl.sum(pieces_before, axis=0)
    count_chunks = ((end - offset + CHUNK - 1) // CHUNK).to(tl.int32)
    count_pieces = ((end - offset + piece_size - 1) // piece_size).to(tl.int32)
    is_last = segment == num_segments - 1
    _cut_segment(
        segment,
        offset,
        end,
        first_chunk,
        count_chunks,
        run_ptr,
        chunk_start_ptr,
        chunk_end_ptr,
        piece_segment_ptr,
        piece_step_ptr,
        piece_inside_ptr,
        piece_before_ptr,
        num_rows,
        num_chunks,
        is_last,
        CHUNK,
        HAS_RESETS,
        False,
        BLOCK,
    )
    _cut_segment(
        segment,
        offset,
        end,
        first_piece,
        count_pieces,
        run_ptr,
        piece_start_ptr,
        piece_end_ptr,
        piece_segment_ptr,
        piece_step_ptr,
        piece_inside_ptr,
        piece_before_ptr,
        num_rows,
        num_pieces,
        is_last,
        piece_size,
        HAS_RESETS,
        True,
        BLOCK,
    )
    # A piece is a whole number of chunks, so its first chunk is its segment's first plus the chunks before it there.
    last = tl.where(is_last, num_pieces, first_piece + count_pieces)
    kept_chunk = tl.minimum(first_chunk, num_chunks - 1).to(tl.int64)
    for first in range(first_piece, last, BLOCK):
        piece = first + tl.arange(0, BLOCK)
        tl.store(
            chunk_ptr + piece,
            kept_chunk + (piece - first_piece).to(tl.int64) * (piece_size // CHUNK),
            mask=piece < last,
        )
    tl.store(first_ptr + segment, tl.minimum(first_piece, num_pieces - 1).to(tl.int64))
    tl.store(last_ptr + segment, tl.maximum(first_piece + count_pieces - 1, 0).to(tl.int64))
    tl.store(empty_ptr + segment, count_pieces == 0)
    if HAS_RESETS:
        at_offset = _run_at(run_ptr, offset, num_rows, offset >= 0)
        tl.store(inside_ptr + segment, _run_at(run_ptr, end, num_rows, end >= 0) > at_offset)
        is_full = end > offset
        spoiled = tl.load(spoiled_ptr + end - 1, mask=is_full, other=0)
        tl.store(spoiled_segment_ptr + segment, spoiled != 0)
        span = segment
        if N > 0:
            span = tl.where(segment < num_spans, segment, (segment - num_spans) // N)
        first_document = tl.load(document_ptr + tl.load(span_offset_ptr + span))
        last_document = tl.load(document_ptr + tl.load(span_offset_ptr + span + 1) - 1)
        # An empty segment hands on what entered it, which is the last document's only if that is the first as well.
        _, token, _ = load_pick(order_ptr, end - 1, num_tokens, is_full, P)
        document = tl.load(document_ptr + token, mask=is_full, other=0)
        tl.store(emptied_ptr + segment, tl.where(is_full, document, first_document) != last_document)


class SegmentTables(NamedTuple):
    """chunk_start_G .. chunk_M: as in triton_rows.Rows, int64. The rest: as in segments.Pieces and its resets."""

    chunk_start_G: Tensor
    chunk_end_G: Tensor
    piece_start_M: Tensor
    piece_end_M: Tensor
    segment_M: Tensor
    step_M: Tensor
    inside_M: Tensor
    before_M: Tensor
    chunk_M: Tensor
    first_S: Tensor
    last_S: Tensor
    empty_S: Tensor
    inside_S: Tensor
    emptied_S: Tensor
    spoiled_S: Tensor

    def pieces(self, size: int, has_resets: bool) -> Pieces:
        """Return the pieces, of at most `size` rows."""
        resets = PieceResets(self.inside_M, self.before_M, self.inside_S, self.emptied_S, self.spoiled_S)
        table = (self.piece_start_M, self.piece_end_M, self.segment_M, self.step_M)
        return Pieces(size, *table, self.first_S, self.last_S, self.empty_S, resets if has_resets else None)


@torch.library.custom_op("megatron_sse::segment_tables", mutates_args=())
def _segment_tables(
    offsets_S1: Tensor,
    offsets_Y1: Tensor,
    document_T: Tensor | None,
    order: Tensor | None,
    run_R: Tensor,
    spoiled_R: Tensor,
    num_tokens: int,
    num_partitions: int,
    piece_size: int,
) -> list[Tensor]:
    out = SegmentTables(
        *_segment_tables_fake(
            offsets_S1, offsets_Y1, document_T, order, run_R, spoiled_R, num_tokens, num_partitions, piece_size
        )
    )
    num_rows = len(run_R)
    cut_segments_kernel[(len(out.first_S),)](
        offsets_S1,
        offsets_Y1,
        offsets_Y1 if document_T is None else document_T,
        offsets_Y1 if order is None else order,
        run_R,
        spoiled_R,
        *out,
        num_tokens,
        num_rows,
        len(offsets_Y1) - 1,
        len(out.chunk_start_G),
        len(out.piece_start_M),
        piece_size,
        N=num_partitions,
        P=num_rows // num_tokens - 1,
        CHUNK=CHUNK_SIZE,
        HAS_RESETS=document_T is not None,
        BLOCK=BLOCK,
        **OPTIONS,
    )
    return list(out)


@_segment_tables.register_fake
def _segment_tables_fake(
    offsets_S1, offsets_Y1, document_T, order, run_R, spoiled_R, num_tokens, num_partitions, piece_size
):
    num_rows, num_segments = len(run_R), len(offsets_S1) - 1
    num_chunks, num_pieces = (num_rows // size + num_segments for size in (CHUNK_SIZE, piece_size))
    sizes = [num_chunks] * 2 + [num_pieces] * 7 + [num_segments] * 6
    of_bool = ("inside_M", "before_M", "empty_S", "inside_S", "emptied_S", "spoiled_S")
    return [
        offsets_S1.new_empty(size, dtype=torch.bool if name in of_bool else torch.int64)
        for name, size in zip(SegmentTables._fields, sizes, strict=True)
    ]


def segment_tables(*arguments) -> SegmentTables:
    """Return the tables of chunks and pieces.

    Args:
        offsets_S1, offsets_Y1, document_T, order: as in row_tables.
        run_R, spoiled_R: from it.
        num_tokens, num_partitions: T and N.
        piece_size: rows of a piece, a multiple of the chunk's.
    """
    return SegmentTables(*_segment_tables(*arguments))


def compile_cases(arch: int) -> list[tuple[triton.JITFunction, dict, dict, dict]]:
    """Return (kernel, signature, constants, options) of everything that is launched, for few and many partitions."""
    kernel, cases = cut_segments_kernel, []
    types = {"run_ptr": "*i32"} | dict.fromkeys(
        ("spoiled_ptr", "piece_inside_ptr", "piece_before_ptr", "empty_ptr", "inside_ptr", "emptied_ptr"), "*i1"
    )
    types["spoiled_segment_ptr"] = "*i1"
    for partitions, picks in ((0, 0), (4, 1), (256, 8)):
        for resets in (False, True):
            constants = {"N": partitions, "P": picks, "CHUNK": CHUNK_SIZE}
            constants |= {"HAS_RESETS": resets, "BLOCK": BLOCK}
            names = [name for name in kernel.arg_names if name not in constants]
            signature = {name: types.get(name, "*i64" if name.endswith("_ptr") else "i32") for name in names}
            cases.append((kernel, signature, constants, OPTIONS))
    return cases
