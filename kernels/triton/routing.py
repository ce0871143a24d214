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
PICK_BLOCK = 256


@triton.jit
def top_banks_kernel(
    prob_ptr, bank_ptr, num_tokens, N: tl.constexpr, P: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Write the banks of the P largest of N probabilities, best first; program (block of tokens).

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


@triton.jit
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


@triton.jit
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


@triton.jit
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
def top_banks(prob_TN: Tensor, num_picks: int) -> Tensor:
    """Return the `num_picks` most probable partitions of each token, int64 [T, P], as kernels.routing.route does."""
    num_tokens, num_partitions = prob_TN.shape
    bank_TP = torch.empty(num_tokens, num_picks, dtype=torch.int64, device=prob_TN.device)
    constants = _top_constants(num_partitions, num_picks)
    grid = (triton.cdiv(num_tokens, constants["BLOCK_T"]),)
    top_banks_kernel[grid](prob_TN.contiguous(), bank_TP, num_tokens, **constants, **OPTIONS)
    return bank_TP


@top_banks.register_fake
def _(prob_TN, num_picks):
    return prob_TN.new_empty(prob_TN.shape[0], num_picks, dtype=torch.int64)


@torch.library.custom_op("megatron_sse::sort_by_segment", mutates_args=())
def sort_by_segment(bank_TP: Tensor, span_T: Tensor, num_spans: int, num_partitions: int) -> tuple[Tensor, Tensor]:
    """Compute kernels.routing.sort_by_segment, for spans that follow each other (span_T never falls)."""
    bank_TP, span_T, device = bank_TP.contiguous(), span_T.contiguous(), bank_TP.device
    num_picks, picks_per_token = bank_TP.numel(), bank_TP.shape[1]
    counting = _count_constants(num_partitions)
    num_blocks, bank_blocks = triton.cdiv(num_picks, PICK_BLOCK), triton.cdiv(num_partitions, counting["BLOCK_N"])

    count_NZ = torch.empty(num_partitions, num_blocks, dtype=torch.int32, device=device)
    count_picks_kernel[(num_blocks, bank_blocks)](bank_TP, count_NZ, num_picks, num_blocks, **counting, **OPTIONS)
    # Picks per bank in the blocks before each block; the last column is their total.
    until_NZ1 = torch.nn.functional.pad(count_NZ.cumsum(1, dtype=torch.int32), (1, 0))

    start_Y1 = torch.searchsorted(span_T, torch.arange(num_spans + 1, device=device))
    before_Y1N = torch.empty(num_spans + 1, num_partitions, dtype=torch.int32, device=device)
    count_before_spans_kernel[(num_spans + 1, bank_blocks)](
        bank_TP, start_Y1, until_NZ1, before_Y1N, num_blocks, P=picks_per_token, **counting, **OPTIONS
    )
    offsets = torch.nn.functional.pad(before_Y1N.diff(dim=0).flatten().cumsum(0), (1, 0))
    # What a pick's `until` counts of earlier spans lies in their segments, so it is taken off here.
    base_YN = offsets[:-1] - before_Y1N[:-1].flatten()

    order = torch.empty(num_picks, dtype=torch.int64, device=device)
    constants = _place_constants(num_partitions, picks_per_token)
    place_picks_kernel[(num_blocks,)](
        bank_TP, span_T, until_NZ1, base_YN, order, num_picks, num_blocks, **constants, **OPTIONS
    )
    return order, offsets


@sort_by_segment.register_fake
def _(bank_TP, span_T, num_spans, num_partitions):
    return bank_TP.new_empty(bank_TP.numel()), bank_TP.new_empty(num_spans * num_partitions + 1)


def compile_cases(arch: int) -> list[tuple[triton.JITFunction, dict, dict, dict]]:
    """Return (kernel, signature, constants, options) of everything that is launched, for few and many partitions."""
    bank, sizes = {"bank_ptr": "*i64"}, {"num_picks": "i32", "num_blocks": "i32"}
    top = {"prob_ptr": "*fp32"} | bank | {"num_tokens": "i32"}
    count = bank | {"count_ptr": "*i32"} | sizes
    spans = bank | {"span_ptr": "*i64", "until_ptr": "*i32"}
    before = spans | {"before_ptr": "*i32", "num_blocks": "i32"}
    place = spans | {"base_ptr": "*i64", "order_ptr": "*i64"} | sizes
    cases = []
    for n, p in ((4, 1), (6, 2), (256, 8)):
        counting = _count_constants(n)
        cases.append((top_banks_kernel, top, _top_constants(n, p), OPTIONS))
        cases.append((count_picks_kernel, count, counting, OPTIONS))
        cases.append((count_before_spans_kernel, before, counting | {"P": p}, OPTIONS))
        cases.append((place_picks_kernel, place, _place_constants(n, p), OPTIONS))
    return cases
