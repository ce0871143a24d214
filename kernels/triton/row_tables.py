"""The rows at the sorted positions, and where documents reset states there, from the tokens' picks.

This is what Spans.segments_of_banks, kernels.resets and triton_rows.make_rows compute in torch, bit for bit, in two
launches: first each position by itself, then with what came before it. Both work on blocks of positions. A block's
summary is how many documents start in it, the last position at which a document or a segment starts, and the last row
that is not finite; each block of the second launch adds up the summaries of those before it.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

OPTIONS = {"num_warps": 4}
BLOCK, TILE = 256, 16
# Bits of a position's flags.
STARTS, OPENS, BAD = tl.constexpr(1), tl.constexpr(2), tl.constexpr(4)


@triton.jit
def load_pick(order_ptr, position, num_tokens, inside, P: tl.constexpr):
    """Load the row, the token and (for picks) the pick at sorted positions, int64."""
    is_pick = inside & (position >= num_tokens)
    pick = position * 0
    if P > 0:
        pick = tl.load(order_ptr + position - num_tokens, mask=is_pick, other=0)
        token = tl.where(is_pick, pick // P, position)
    else:
        token = position
    return tl.where(is_pick, num_tokens + pick, position), token, pick


@triton.jit
def _is_not_finite(x_ptr, index, mask):
    x = tl.load(x_ptr + index, mask=mask, other=0.0)
    return ~(tl.abs(x) < float("inf"))


@triton.jit(do_not_specialize=["num_tokens", "num_rows", "num_spans"])
def mark_rows_kernel(
    order_ptr,
    bank_ptr,
    span_ptr,
    document_ptr,
    span_offset_ptr,
    offset_ptr,
    bad_ptr,
    writes_ptr,
    write_ptr,
    read_ptr,
    row_ptr,
    token_ptr,
    flags_ptr,
    summary_ptr,
    num_tokens,
    num_rows,
    num_spans,
    N: tl.constexpr,
    P: tl.constexpr,
    HAS_RESETS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write each sorted position's row and token, its flags, and the block's summary [3, Z]; program (block)."""
    block = tl.program_id(0)
    position = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = position < num_rows
    row, token, pick = load_pick(order_ptr, position, num_tokens, inside, P)
    tl.store(row_ptr + position, row.to(tl.int32), mask=inside)
    tl.store(token_ptr + position, token.to(tl.int32), mask=inside)
    if HAS_RESETS:
        is_pick = position >= num_tokens
        span = tl.load(span_ptr + token, mask=inside, other=0)
        segment = span
        if P > 0:
            bank = tl.load(bank_ptr + pick, mask=inside & is_pick, other=0)
            segment = tl.where(is_pick, num_spans + span * N + bank, span)
        opens = position == tl.load(offset_ptr + segment, mask=inside, other=-1)
        document = tl.load(document_ptr + token, mask=inside, other=0)
        _, token_before, _ = load_pick(order_ptr, position - 1, num_tokens, inside & (position > 0), P)
        # In front of a segment's first row is what entered its span: the span's first document.
        first = tl.load(span_offset_ptr + span, mask=inside, other=0)
        token_before = tl.where(opens, first, token_before)
        starts = inside & (document != tl.load(document_ptr + token_before, mask=inside, other=0))
        bad = tl.load(bad_ptr + tl.where(is_pick, num_tokens, 0) + token, mask=inside, other=0) != 0
        if P > 0:
            bad = bad | _is_not_finite(writes_ptr, pick, inside & is_pick)
            bad = bad | _is_not_finite(write_ptr, pick, inside & is_pick)
            bad = bad | _is_not_finite(read_ptr, pick, inside & is_pick)
        flags = tl.where(starts, STARTS, 0) | tl.where(inside & opens, OPENS, 0) | tl.where(bad, BAD, 0)
        tl.store(flags_ptr + position, flags, mask=inside)
        marked = inside & (starts | opens)
        num_blocks = tl.num_programs(0)
        tl.store(summary_ptr + block, tl.sum(starts.to(tl.int32), axis=0))
        tl.store(summary_ptr + num_blocks + block, tl.max(tl.where(marked, position, 0), axis=0).to(tl.int32))
        tl.store(
            summary_ptr + 2 * num_blocks + block, tl.max(tl.where(inside & bad, position, -1), axis=0).to(tl.int32)
        )


@triton.jit
def _before(summary_ptr, block, num_blocks, least: tl.constexpr, BLOCK: tl.constexpr, SUM: tl.constexpr):
    """Return the sum or the largest of the summaries before `block`."""
    found = tl.full([BLOCK], least, tl.int32)
    for first in range(0, block, BLOCK):
        other = first + tl.arange(0, BLOCK)
        x = tl.load(summary_ptr + other, mask=other < block, other=least)
        found = found + x if SUM else tl.maximum(found, x)
    return tl.sum(found, axis=0) if SUM else tl.max(found, axis=0)


@triton.jit(do_not_specialize=["num_tokens", "num_rows"])
def spoil_rows_kernel(
    flags_ptr,
    summary_ptr,
    row_ptr,
    token_ptr,
    writes_ptr,
    write_ptr,
    read_ptr,
    run_ptr,
    spoiled_ptr,
    spoiled_row_ptr,
    rows_writes_ptr,
    rows_write_ptr,
    rows_read_ptr,
    num_tokens,
    num_rows,
    P: tl.constexpr,
    DELTA_RULE: tl.constexpr,
    HAS_RESETS: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    """Write runs, which positions and rows are spoiled, their token as -1, and the rows' scales; program (block)."""
    block, num_blocks = tl.program_id(0), tl.num_programs(0)
    position = block * BLOCK + tl.arange(0, BLOCK)
    inside = position < num_rows
    row = tl.load(row_ptr + position, mask=inside, other=0)
    # The shared bank's rows write and read with factor 1.
    writes, write, read = (
        tl.full([BLOCK], 1.0, tl.float32),
        tl.full([BLOCK], 1.0, tl.float32),
        tl.full([BLOCK], 1.0, tl.float32),
    )
    if P > 0:
        pick, is_pick = row - num_tokens, inside & (row >= num_tokens)
        writes = tl.load(writes_ptr + pick, mask=is_pick, other=1.0)
        write = tl.load(write_ptr + pick, mask=is_pick, other=1.0)
        read = tl.load(read_ptr + pick, mask=is_pick, other=1.0)
    if HAS_RESETS:
        flags = tl.load(flags_ptr + position, mask=inside, other=0)
        starts = flags & STARTS
        run = tl.cumsum(starts, axis=0) + _before(summary_ptr, block, num_blocks, 0, BLOCK, True)
        tl.store(run_ptr + position, run, mask=inside)
        # The first row of the same document and segment, and the last row up to this one that is not finite.
        first = tl.zeros([BLOCK], tl.int32) + _before(summary_ptr + num_blocks, block, num_blocks, 0, BLOCK, False)
        last_bad = tl.zeros([BLOCK], tl.int32) + _before(
            summary_ptr + 2 * num_blocks, block, num_blocks, -1, BLOCK, False
        )
        for tile in range(0, BLOCK, TILE):
            other = block * BLOCK + tile + tl.arange(0, TILE)
            others = tl.load(flags_ptr + other, mask=other < num_rows, other=0)
            earlier = other[None, :] <= position[:, None]
            marked = earlier & ((others & (STARTS | OPENS)) != 0)[None, :]
            first = tl.maximum(first, tl.max(tl.where(marked, other[None, :], 0), axis=1))
            bad = earlier & ((others & BAD) != 0)[None, :]
            last_bad = tl.maximum(last_bad, tl.max(tl.where(bad, other[None, :], -1), axis=1))
        spoiled = last_bad >= first
        tl.store(spoiled_ptr + position, spoiled, mask=inside)
        tl.store(spoiled_row_ptr + row, spoiled, mask=inside)
        tl.store(token_ptr + position, -1, mask=inside & spoiled)

        # Without write strengths, `writes` scales log decays alone, of which resets have none (see gla.py).
        idle = spoiled
        if not DELTA_RULE:
            idle = spoiled | (starts != 0)
        tl.store(rows_writes_ptr + row, tl.where(idle, 0.0, writes), mask=inside)
        tl.store(rows_write_ptr + row, tl.where(spoiled, 0.0, write), mask=inside)
        tl.store(rows_read_ptr + row, tl.where(spoiled, 0.0, read), mask=inside)
    else:
        tl.store(run_ptr + position, 0, mask=inside)
        tl.store(rows_writes_ptr + row, writes, mask=inside)
        tl.store(rows_write_ptr + row, write, mask=inside)
        tl.store(rows_read_ptr + row, read, mask=inside)


class RowTables(NamedTuple):
    """R sorted positions. row_R, token_R, run_R: as in triton_rows.Rows, int32.

    spoiled_R: by position, spoiled_rows_R: by row, bool, whether a row of the same document and segment, up to this
        one, is not finite (see kernels.resets).
    writes_R, write_R, read_R: fp32, by row, what scales log decays and write strengths, values, and outputs; zeros for
        spoiled rows.
    """

    row_R: Tensor
    token_R: Tensor
    run_R: Tensor
    spoiled_R: Tensor
    spoiled_rows_R: Tensor
    writes_R: Tensor
    write_R: Tensor
    read_R: Tensor


@torch.library.custom_op("megatron_sse::row_tables", mutates_args=())
def _row_tables(
    order: Tensor | None,
    bank_TP: Tensor | None,
    span_T: Tensor,
    document_T: Tensor | None,
    offsets_Y1: Tensor,
    offsets_S1: Tensor,
    bad_ZT: Tensor | None,
    writes_TP: Tensor | None,
    write_TP: Tensor | None,
    read_TP: Tensor | None,
    num_partitions: int,
    delta_rule: bool,
) -> list[Tensor]:
    out = RowTables(*_row_tables_fake(order, bank_TP, span_T))
    num_tokens, num_rows = len(span_T), len(out.row_R)
    num_blocks = triton.cdiv(num_rows, BLOCK)
    flags_R, summary_3Z = torch.empty_like(out.row_R), out.row_R.new_empty(3, num_blocks)
    # Triton needs a pointer for every argument; what this variant does not read may be any tensor.
    scales = [span_T if x is None else x.contiguous() for x in (writes_TP, write_TP, read_TP)]
    picks = 0 if bank_TP is None else bank_TP.shape[1]
    common = {"P": picks, "HAS_RESETS": document_T is not None, "BLOCK": BLOCK}
    mark_rows_kernel[(num_blocks,)](
        span_T if order is None else order,
        span_T if bank_TP is None else bank_TP.contiguous(),
        span_T,
        span_T if document_T is None else document_T,
        offsets_Y1,
        offsets_S1,
        span_T if bad_ZT is None else bad_ZT,
        *scales,
        out.row_R,
        out.token_R,
        flags_R,
        summary_3Z,
        num_tokens,
        num_rows,
        len(offsets_Y1) - 1,
        N=num_partitions,
        **common,
        **OPTIONS,
    )
    spoil_rows_kernel[(num_blocks,)](
        flags_R,
        summary_3Z,
        out.row_R,
        out.token_R,
        *scales,
        *out[2:],
        num_tokens,
        num_rows,
        DELTA_RULE=delta_rule,
        TILE=TILE,
        **common,
        **OPTIONS,
    )
    return list(out)


@_row_tables.register_fake
def _row_tables_fake(order, bank_TP, span_T, *rest):
    num_rows = len(span_T) + (0 if bank_TP is None else bank_TP.numel())
    numbers = (span_T.new_empty(num_rows, dtype=torch.int32) for _ in range(3))
    spoiled = (span_T.new_empty(num_rows, dtype=torch.bool) for _ in range(2))
    return [*numbers, *spoiled, *(span_T.new_empty(num_rows, dtype=torch.float32) for _ in range(3))]


def row_tables(*arguments) -> RowTables:
    """Return the tables of rows.

    Args:
        order: the picks by segment, int64 [T P]; with bank_TP, the picked partitions; None where there are none.
        span_T, document_T, offsets_Y1: as in segments.Spans.
        offsets_S1: int64, the segments' offsets.
        bad_ZT: which tokens are not finite (finite.bad_tokens); None without documents.
        writes_TP, write_TP, read_TP: fp32, of the picks (banks.Picks).
        num_partitions: N.
        delta_rule: whether there are write strengths; otherwise rows at which a document starts have writes of 0.
    """
    return RowTables(*_row_tables(*arguments))


def compile_cases(arch: int) -> list[tuple[triton.JITFunction, dict, dict, dict]]:
    """Return (kernel, signature, constants, options) of everything that is launched, for few and many partitions."""
    types = dict.fromkeys(
        ("order_ptr", "bank_ptr", "span_ptr", "document_ptr", "span_offset_ptr", "offset_ptr"), "*i64"
    )
    types |= dict.fromkeys(("writes_ptr", "write_ptr", "read_ptr"), "*fp32")
    types |= dict.fromkeys(("rows_writes_ptr", "rows_write_ptr", "rows_read_ptr"), "*fp32")
    types |= {"spoiled_ptr": "*i1", "spoiled_row_ptr": "*i1"}
    cases = []
    for kernel, rest in ((mark_rows_kernel, {"N"}), (spoil_rows_kernel, {"DELTA_RULE", "TILE"})):
        for partitions, picks in ((0, 0), (4, 1), (256, 8)):
            for resets in (False, True):
                constants = {"P": picks, "HAS_RESETS": resets, "BLOCK": BLOCK}
                more = {"N": partitions, "DELTA_RULE": False, "TILE": TILE}
                constants |= {name: value for name, value in more.items() if name in rest}
                names = [name for name in kernel.arg_names if name not in constants]
                signature = {name: types.get(name, "*i32" if name.endswith("_ptr") else "i32") for name in names}
                cases.append((kernel, signature, constants, OPTIONS))
    return cases
