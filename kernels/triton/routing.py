"""The router's picks and their order by segment: a counting sort, whose sizes all follow from what the host knows.

A pick's place in the order is `base + until + rank`. `base`: picks in earlier segments, less those of the same bank in
earlier spans. `until`: picks of the same bank in earlier blocks of picks. `rank`: those earlier in its own block.
For example, picks a b a | b a (two spans, blocks of 4): sorted a a b | a b. The last a has base 3 - 2 (3 picks in
the first span, of which 2 are a), until 2 (the first block's), rank 0: place 3.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

OPTIONS = {"num_warps": 4}
PICK_BLOCK, SUM_BLOCK = 256, 1024


@triton.jit
def top_banks_kernel(
    prob_ptr,
    bank_ptr,
    weight_ptr,
    num_tokens,
    N: tl.constexpr,
    P: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Write the banks of the P largest of N probabilities, best first, and these; program (block of tokens).

    Among equal probabilities, the lower index comes first.
    """
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    bank = tl.arange(0, BLOCK_N)
    inside = token < num_tokens
    place = token[:, None] * N + bank
    b_prob = tl.load(prob_ptr + place, mask=inside[:, None] & (bank < N), other=float("-inf"))
    # NaN counts as the largest, as in torch, so that every pick stays a valid index.
    b_prob = tl.where(b_prob != b_prob, float("inf"), b_prob)
    # P is small: picking the largest P times is cheaper than sorting all N.
    for pick in tl.static_range(P):
        b_best = tl.argmax(b_prob, axis=1, tie_break_left=True)
        tl.store(bank_ptr + token * P + pick, b_best.to(tl.int64), mask=inside)
        # Read once more: NaN has become inf in b_prob.
        b_weight = tl.load(prob_ptr + token * N + b_best, mask=inside)
        tl.store(weight_ptr + token * P + pick, b_weight, mask=inside)
        b_prob = tl.where(bank == b_best[:, None], float("-inf"), b_prob)


@triton.jit
def _count(bank_ptr, start, end, bank, BLOCK: tl.constexpr, TILE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Count how many of the picks start .. end - 1 (at most BLOCK) went to each bank."""
    b_count = tl.zeros([BLOCK_N], tl.int32)
    for first in range(0, BLOCK, TILE):
        pick = start + first + tl.arange(0, TILE)
        b_bank = tl.load(bank_ptr + pick, mask=pick < end, other=-1)
        b_count += tl.sum((b_bank[:, None] == bank).to(tl.int32), axis=0)
    return b_count


@triton.jit(do_not_specialize=["num_picks", "num_blocks"])
def count_picks_kernel(
    bank_ptr,
    count_ptr,
    num_picks,
    num_blocks,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Count the picks per bank in each block of picks, [N, blocks]; program (block, block of banks)."""
    block = tl.program_id(0).to(tl.int64)
    bank = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    b_count = _count(bank_ptr, block * BLOCK, num_picks, bank, BLOCK, TILE, BLOCK_N)
    tl.store(count_ptr + bank.to(tl.int64) * num_blocks + block, b_count, mask=bank < N)


@triton.jit(do_not_specialize=["num_blocks"])
def sum_counts_kernel(count_ptr, until_ptr, num_blocks, BLOCK: tl.constexpr):
    """Add up a bank's picks in the blocks before each block; the last column is their total; program (bank)."""
    bank = tl.program_id(0).to(tl.int64)
    total = tl.sum(tl.zeros([BLOCK], tl.int32), axis=0)
    until_ptr += bank * (num_blocks + 1)
    tl.store(until_ptr, total)
    for first in range(0, num_blocks, BLOCK):
        block = first + tl.arange(0, BLOCK)
        b_count = tl.load(count_ptr + bank * num_blocks + block, mask=block < num_blocks, other=0)
        tl.store(until_ptr + block + 1, total + tl.cumsum(b_count, axis=0), mask=block < num_blocks)
        total += tl.sum(b_count, axis=0)


@triton.jit(do_not_specialize=["num_blocks"])
def count_before_spans_kernel(
    bank_ptr,
    span_ptr,
    until_ptr,
    before_ptr,
    num_blocks,
    N: tl.constexpr,
    P: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Count the picks per bank before each span's first token, [Y + 1, N]; program (span, block of banks)."""
    span = tl.program_id(0).to(tl.int64)
    bank = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    end = tl.load(span_ptr + span) * P
    block = end // BLOCK
    # First the blocks that end before the span, then the part of the block in which it starts.
    b_before = tl.load(until_ptr + bank.to(tl.int64) * (num_blocks + 1) + block, mask=bank < N, other=0)
    b_before += _count(bank_ptr, block * BLOCK, end, bank, BLOCK, TILE, BLOCK_N)
    tl.store(before_ptr + span * N + bank, b_before, mask=bank < N)


@triton.jit(do_not_specialize=["num_tokens", "num_spans"])
def offsets_kernel(
    span_offset_ptr,
    before_ptr,
    offset_ptr,
    base_ptr,
    num_tokens,
    num_spans,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the offsets of all banks' segments, and the base of each span's and bank's picks; one program."""
    for first in range(0, num_spans + 1, BLOCK):
        span = first + tl.arange(0, BLOCK)
        offset = tl.load(span_offset_ptr + span, mask=span <= num_spans, other=0)
        tl.store(offset_ptr + span, offset, mask=span <= num_spans)
    total = tl.sum(tl.zeros([BLOCK], tl.int32), axis=0).to(tl.int64)
    for first in range(0, num_spans * N, BLOCK):
        segment = first + tl.arange(0, BLOCK)
        inside = segment < num_spans * N
        # before is [Y + 1, N], so that the picks before the next span are N places further.
        b_before = tl.load(before_ptr + segment, mask=inside, other=0).to(tl.int64)
        b_count = tl.load(before_ptr + segment + N, mask=inside, other=0).to(tl.int64) - b_before
        b_end = total + tl.cumsum(b_count, axis=0)
        tl.store(offset_ptr + num_spans + 1 + segment, num_tokens + b_end, mask=inside)
        # What a pick's `until` counts of earlier spans lies in their segments, so it is taken off here.
        tl.store(base_ptr + segment, b_end - b_count - b_before, mask=inside)
        total += tl.sum(b_count, axis=0)


@triton.jit(do_not_specialize=["num_picks", "num_blocks"])
def place_picks_kernel(
    bank_ptr,
    span_ptr,
    until_ptr,
    base_ptr,
    order_ptr,
    num_picks,
    num_blocks,
    N: tl.constexpr,
    P: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    """Write each pick's number to its place in the order (see the module); program (block of picks)."""
    block = tl.program_id(0).to(tl.int64)
    own = tl.arange(0, BLOCK)
    pick = block * BLOCK + own
    inside = pick < num_picks
    b_bank = tl.load(bank_ptr + pick, mask=inside, other=-1).to(tl.int32)
    b_rank = tl.zeros([BLOCK], tl.int32)
    for first in range(0, BLOCK, TILE):
        other = first + tl.arange(0, TILE)
        b_other = tl.load(bank_ptr + block * BLOCK + other, mask=block * BLOCK + other < num_picks, other=-1)
        # Compared in tiles: all pairs of a block at once would not fit into registers.
        earlier = (b_bank[:, None] == b_other.to(tl.int32)) & (other < own[:, None])
        b_rank += tl.sum(earlier.to(tl.int32), axis=1)
    b_span = tl.load(span_ptr + pick // P, mask=inside, other=0)
    b_until = tl.load(until_ptr + b_bank.to(tl.int64) * (num_blocks + 1) + block, mask=inside, other=0)
    b_base = tl.load(base_ptr + b_span * N + b_bank, mask=inside, other=0)
    tl.store(order_ptr + b_base + b_until + b_rank, pick, mask=inside)


def _top_constants(num_partitions: int, num_picks: int) -> dict:
    block_n = triton.next_power_of_2(num_partitions)
    return {"N": num_partitions, "P": num_picks, "BLOCK_T": min(128, 4096 // block_n), "BLOCK_N": block_n}


def _count_constants(num_partitions: int) -> dict:
    block_n = min(32, triton.next_power_of_2(num_partitions))
    return {"N": num_partitions, "BLOCK": PICK_BLOCK, "TILE": 64, "BLOCK_N": block_n}


def _place_constants(num_partitions: int, num_picks: int) -> dict:
    return {"N": num_partitions, "P": num_picks, "BLOCK": PICK_BLOCK, "TILE": 16}


@torch.library.custom_op("megatron_sse::top_banks", mutates_args=())
def _top_banks(prob_TN: Tensor, num_picks: int) -> tuple[Tensor, Tensor]:
    num_tokens, num_partitions = prob_TN.shape
    bank_TP, weight_TP = _top_banks_fake(prob_TN, num_picks)
    constants = _top_constants(num_partitions, num_picks)
    grid = (triton.cdiv(num_tokens, constants["BLOCK_T"]),)
    top_banks_kernel[grid](prob_TN.contiguous(), bank_TP, weight_TP, num_tokens, **constants, **OPTIONS)
    return bank_TP, weight_TP


@_top_banks.register_fake
def _top_banks_fake(prob_TN, num_picks):
    weight_TP = prob_TN.new_empty(prob_TN.shape[0], num_picks)
    return torch.empty_like(weight_TP, dtype=torch.int64), weight_TP


class _TopBanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, prob_TN, num_picks):
        bank_TP, weight_TP = _top_banks(prob_TN, num_picks)
        ctx.mark_non_differentiable(bank_TP)
        # No zeros are made for the picks' gradient.
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(bank_TP)
        ctx.num_partitions = prob_TN.shape[-1]
        return bank_TP, weight_TP

    @staticmethod
    def backward(ctx, _, grad_TP):
        [bank_TP] = ctx.saved_tensors
        if grad_TP is None:
            return None, None
        # A token's picks differ from each other.
        return grad_TP.new_zeros(len(bank_TP), ctx.num_partitions).scatter_(-1, bank_TP, grad_TP), None


def top_banks(prob_TN: Tensor, num_picks: int) -> tuple[Tensor, Tensor]:
    """Return the `num_picks` most probable partitions of each token, int64 [T, P], as kernels.routing.route does, and
    their probabilities [T, P]."""
    bank_TP, weight_TP = _TopBanks.apply(prob_TN, num_picks)
    return bank_TP, weight_TP


@torch.library.custom_op("megatron_sse::sort_picks", mutates_args=())
def sort_picks(bank_TP: Tensor, span_T: Tensor, offsets_Y1: Tensor, num_partitions: int) -> tuple[Tensor, Tensor]:
    """Return the picks by segment, int64 [T P], and the offsets of the segments of all banks (segments.Segments).

    offsets_Y1: the spans' offsets over the tokens.
    """
    bank_TP, span_T, device = bank_TP.contiguous(), span_T.contiguous(), bank_TP.device
    num_picks, picks_per_token = bank_TP.numel(), bank_TP.shape[1]
    num_spans = len(offsets_Y1) - 1
    counting = _count_constants(num_partitions)
    num_blocks, bank_blocks = triton.cdiv(num_picks, PICK_BLOCK), triton.cdiv(num_partitions, counting["BLOCK_N"])

    def empty(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    count_NZ, until_NZ1 = empty(num_partitions, num_blocks), empty(num_partitions, num_blocks + 1)
    count_picks_kernel[(num_blocks, bank_blocks)](bank_TP, count_NZ, num_picks, num_blocks, **counting, **OPTIONS)
    sum_counts_kernel[(num_partitions,)](count_NZ, until_NZ1, num_blocks, BLOCK=SUM_BLOCK, **OPTIONS)
    before_Y1N = empty(num_spans + 1, num_partitions)
    count_before_spans_kernel[(num_spans + 1, bank_blocks)](
        bank_TP, offsets_Y1, until_NZ1, before_Y1N, num_blocks, P=picks_per_token, **counting, **OPTIONS
    )
    offsets_S1, base_YN = (
        empty(size, dtype=torch.int64) for size in (num_spans * (1 + num_partitions) + 1, num_spans * num_partitions)
    )
    offsets_kernel[(1,)](
        offsets_Y1,
        before_Y1N,
        offsets_S1,
        base_YN,
        len(span_T),
        num_spans,
        N=num_partitions,
        BLOCK=SUM_BLOCK,
        **OPTIONS,
    )
    order = empty(num_picks, dtype=torch.int64)
    constants = _place_constants(num_partitions, picks_per_token)
    place_picks_kernel[(num_blocks,)](
        bank_TP, span_T, until_NZ1, base_YN, order, num_picks, num_blocks, **constants, **OPTIONS
    )
    return order, offsets_S1


@sort_picks.register_fake
def _(bank_TP, span_T, offsets_Y1, num_partitions):
    num_segments = (len(offsets_Y1) - 1) * (1 + num_partitions)
    return bank_TP.new_empty(bank_TP.numel()), bank_TP.new_empty(num_segments + 1)


def sort_by_segment(bank_TP: Tensor, span_T: Tensor, num_spans: int, num_partitions: int) -> tuple[Tensor, Tensor]:
    """Compute kernels.routing.sort_by_segment, for spans that follow each other (span_T never falls)."""
    offsets_Y1 = torch.searchsorted(span_T.contiguous(), torch.arange(num_spans + 1, device=span_T.device))
    order, offsets_S1 = sort_picks(bank_TP, span_T, offsets_Y1, num_partitions)
    return order, offsets_S1[num_spans:] - len(span_T)


def compile_cases(arch: int) -> list[tuple[triton.JITFunction, dict, dict, dict]]:
    """Return (kernel, signature, constants, options) of everything that is launched, for few and many partitions."""
    bank, sizes = {"bank_ptr": "*i64"}, {"num_picks": "i32", "num_blocks": "i32"}
    top = {"prob_ptr": "*fp32"} | bank | {"weight_ptr": "*fp32", "num_tokens": "i32"}
    count = bank | {"count_ptr": "*i32"} | sizes
    spans = bank | {"span_ptr": "*i64", "until_ptr": "*i32"}
    before = spans | {"before_ptr": "*i32", "num_blocks": "i32"}
    place = spans | {"base_ptr": "*i64", "order_ptr": "*i64"} | sizes
    sums = {"count_ptr": "*i32", "until_ptr": "*i32", "num_blocks": "i32"}
    offsets = {"span_offset_ptr": "*i64", "before_ptr": "*i32", "offset_ptr": "*i64", "base_ptr": "*i64"}
    offsets |= {"num_tokens": "i32", "num_spans": "i32"}
    cases = []
    for n, p in ((4, 1), (6, 2), (256, 8)):
        counting = _count_constants(n)
        cases.append((top_banks_kernel, top, _top_constants(n, p), OPTIONS))
        cases.append((count_picks_kernel, count, counting, OPTIONS))
        cases.append((sum_counts_kernel, sums, {"BLOCK": SUM_BLOCK}, OPTIONS))
        cases.append((offsets_kernel, offsets, {"N": n, "BLOCK": SUM_BLOCK}, OPTIONS))
        cases.append((count_before_spans_kernel, before, counting | {"P": p}, OPTIONS))
        cases.append((place_picks_kernel, place, _place_constants(n, p), OPTIONS))
    return cases
