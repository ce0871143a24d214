"""The scan over pieces: one program per segment, head and block of the state, so that segments run in parallel.

The grid has one dimension. With 2 heads and 3 blocks, program 0 is (segment 0, head 0, block 0), program 4 is (0, 1, 1)
and program 6 is (1, 0, 0): the block varies fastest. Each program walks its segment's pieces one after the other.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_sse.kernels.segments import Pieces

STATE_BLOCK = 1024
COLUMN_BLOCK = 16


@triton.jit
def _walk(first_ptr, last_ptr, empty_ptr, segment, REVERSE: tl.constexpr):
    """Return the first piece of the segment to visit, the step to the next (1 or -1), and the number of pieces."""
    first, last = tl.load(first_ptr + segment), tl.load(last_ptr + segment)
    count = tl.where(tl.load(empty_ptr + segment), 0, last - first + 1)
    if REVERSE:
        start, step = last, -1
    else:
        start, step = first, 1
    return start, step, count


@triton.jit
def scan_decay_kernel(
    transition_ptr,
    increment_ptr,
    initial_ptr,
    entering_ptr,
    final_ptr,
    first_ptr,
    last_ptr,
    empty_ptr,
    reset_ptr,
    num_heads,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    HAS_RESETS: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """Run state <- transition state + increment with a decay per key channel; program (segment, head, block of K x V).

    Where HAS_RESETS, the transition is taken for zero, whatever the state, in pieces that `reset` marks.
    Cells of the state are independent, so a block is any BLOCK of the K * V cells in memory order.
    """
    size: tl.constexpr = KEY_DIM * VALUE_DIM
    num_blocks: tl.constexpr = (size + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    head = program // num_blocks % num_heads
    segment = (program // (num_blocks * num_heads)).to(tl.int64)
    start, step, count = _walk(first_ptr, last_ptr, empty_ptr, segment, REVERSE)

    # With K = 2, V = 3 and blocks of 4: block 0 has row 0 and the first cell of row 1, block 1 the other two cells.
    cell = program % num_blocks * BLOCK + tl.arange(0, BLOCK)
    inside = cell < size
    channel = cell // VALUE_DIM
    own = (segment * num_heads + head) * size + cell
    if HAS_INITIAL:
        b_state = tl.load(initial_ptr + own, mask=inside, other=0.0)
    else:
        b_state = tl.zeros([BLOCK], tl.float32)
    for i in range(count):
        place = (start + i * step) * num_heads + head
        b_decay = tl.load(transition_ptr + place * KEY_DIM + channel, mask=inside, other=0.0)
        b_increment = tl.load(increment_ptr + place * size + cell, mask=inside, other=0.0)
        tl.store(entering_ptr + place * size + cell, b_state, mask=inside)
        b_state = b_decay * b_state
        if HAS_RESETS:
            # Selected: the state may be inf or nan.
            b_state = tl.where(tl.load(reset_ptr + start + i * step), 0.0, b_state)
        b_state += b_increment
    tl.store(final_ptr + own, b_state, mask=inside)


@triton.jit
def _begin(
    initial_ptr,
    to_ptr,
    column,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
):
    """Write columns of a segment's initial state to `to_ptr`."""
    for row_start in range(0, KEY_DIM, BLOCK_K):
        row = row_start + tl.arange(0, BLOCK_K)
        cell = row[:, None] * VALUE_DIM + column
        inside = (row < KEY_DIM)[:, None] & (column < VALUE_DIM)
        if HAS_INITIAL:
            b_state = tl.load(initial_ptr + cell, mask=inside, other=0.0)
        else:
            b_state = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
        tl.store(to_ptr + cell, b_state, mask=inside)


@triton.jit
def scan_matrix_kernel(
    transition_ptr,
    increment_ptr,
    initial_ptr,
    entering_ptr,
    final_ptr,
    first_ptr,
    last_ptr,
    empty_ptr,
    reset_ptr,
    num_heads,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    HAS_RESETS: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """Run state <- transition state + increment with a matrix (transposed in reverse); resets as in scan_decay_kernel.

    Program (segment, head, block of V). A matrix mixes the rows of the state but not its columns, so a block is BLOCK_V
    full columns. These would not fit into registers: each step writes the state that enters the next piece to memory,
    and the next step reads it back in blocks of BLOCK_K rows.
    """
    size: tl.constexpr = KEY_DIM * VALUE_DIM
    num_blocks: tl.constexpr = (VALUE_DIM + BLOCK_V - 1) // BLOCK_V
    program = tl.program_id(0)
    head = program // num_blocks % num_heads
    segment = (program // (num_blocks * num_heads)).to(tl.int64)
    start, step, count = _walk(first_ptr, last_ptr, empty_ptr, segment, REVERSE)

    column = program % num_blocks * BLOCK_V + tl.arange(0, BLOCK_V)
    key = tl.arange(0, BLOCK_K)
    own = (segment * num_heads + head) * size
    # The initial state enters the first piece; of a segment without pieces it is the final state.
    if count > 0:
        to_ptr = entering_ptr + (start * num_heads + head) * size
    else:
        to_ptr = final_ptr + own
    _begin(initial_ptr + own, to_ptr, column, KEY_DIM, VALUE_DIM, BLOCK_K, BLOCK_V, HAS_INITIAL)
    # Not pipelined: a step reads what the one before it stored.
    for i in tl.range(0, count, num_stages=1):
        # The loads below read what other threads of this program stored in the step before.
        tl.debug_barrier()
        place = (start + i * step) * num_heads + head
        passes = True
        if HAS_RESETS:
            passes = tl.load(reset_ptr + start + i * step) == 0
        if i + 1 < count:
            to_ptr = entering_ptr + (place + step * num_heads) * size
        else:
            to_ptr = final_ptr + own
        for row_start in range(0, KEY_DIM, BLOCK_K):
            row = row_start + key
            cell = row[:, None] * VALUE_DIM + column
            inside = (row < KEY_DIM)[:, None] & (column < VALUE_DIM)
            b_state = tl.load(increment_ptr + place * size + cell, mask=inside, other=0.0)
            for k_start in range(0, KEY_DIM, BLOCK_K):
                k = k_start + key
                # The transposed matrix is read, not made: entry (row, k) of it is entry (k, row) in memory.
                if REVERSE:
                    entry = k[None, :] * KEY_DIM + row[:, None]
                else:
                    entry = row[:, None] * KEY_DIM + k[None, :]
                square = (row < KEY_DIM)[:, None] & (k < KEY_DIM)
                b_transition = tl.load(transition_ptr + place * KEY_DIM * KEY_DIM + entry, mask=square, other=0.0)
                met = (k < KEY_DIM)[:, None] & (column < VALUE_DIM) & passes
                entering = place * size + k[:, None] * VALUE_DIM + column
                b_entering = tl.load(entering_ptr + entering, mask=met, other=0.0)
                b_state = tl.dot(b_transition, b_entering, b_state, input_precision="ieee")
            tl.store(to_ptr + cell, b_state, mask=inside)


def _choose(key_dim: int, value_dim: int, columns: int) -> tuple[triton.JITFunction, int, dict, dict]:
    """Return kernel, blocks per state, constants and options for transitions of 1 or K columns."""
    dims = {"KEY_DIM": key_dim, "VALUE_DIM": value_dim}
    if columns == 1:
        num_blocks = triton.cdiv(key_dim * value_dim, STATE_BLOCK)
        return scan_decay_kernel, num_blocks, dims | {"BLOCK": STATE_BLOCK}, {"num_warps": 4, "num_stages": 2}
    # tl.dot takes no blocks below 16.
    blocks = {"BLOCK_K": min(64, max(16, triton.next_power_of_2(key_dim))), "BLOCK_V": COLUMN_BLOCK}
    return scan_matrix_kernel, triton.cdiv(value_dim, COLUMN_BLOCK), dims | blocks, {"num_warps": 4, "num_stages": 2}


@torch.library.custom_op("megatron_sse::scan", mutates_args=())
def _scan(
    transition_M: Tensor,
    increment_M: Tensor,
    initial_S: Tensor | None,
    first_S: Tensor,
    last_S: Tensor,
    empty_S: Tensor,
    reset_M: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    _, num_heads, key_dim, value_dim = increment_M.shape
    num_segments = first_S.shape[0]
    # Zeros for the unused pieces at the end of the tables, which no program visits.
    entering_M = torch.zeros_like(increment_M)
    final_S = increment_M.new_empty(num_segments, num_heads, key_dim, value_dim)
    kernel, num_blocks, constants, options = _choose(key_dim, value_dim, transition_M.shape[-1])
    kernel[(num_segments * num_heads * num_blocks,)](
        transition_M,
        increment_M,
        increment_M if initial_S is None else initial_S,
        entering_M,
        final_S,
        first_S,
        last_S,
        empty_S,
        empty_S if reset_M is None else reset_M,
        num_heads,
        HAS_INITIAL=initial_S is not None,
        HAS_RESETS=reset_M is not None,
        REVERSE=reverse,
        **constants,
        **options,
    )
    return entering_M, final_S


@_scan.register_fake
def _(transition_M, increment_M, initial_S, first_S, last_S, empty_S, reset_M, reverse):
    return torch.empty_like(increment_M), increment_M.new_empty(first_S.shape[0], *increment_M.shape[1:])


def run_scan(
    transition_M: Tensor, increment_M: Tensor, initial_S: Tensor | None, pieces: Pieces, reverse: bool
) -> tuple[Tensor, Tensor]:
    """Return the states that enter the pieces [M, H, K, V], zero at unused ones, and those that leave the segments.

    Args:
        transition_M: fp32 [M, H, K, 1] or [M, H, K, K].
        increment_M: fp32 [M, H, K, V].
        initial_S: fp32 [S, H, K, V], None for zeros.
        reverse: scan with the transposed transitions, from the last piece of each segment to the first.
    """
    initial_S = None if initial_S is None else initial_S.contiguous()
    reset_M = None if pieces.resets is None else pieces.resets.inside_M
    tables = pieces.first_S, pieces.last_S, pieces.empty_S, reset_M
    return _scan(transition_M.contiguous(), increment_M.contiguous(), initial_S, *tables, reverse)


def compile_cases(arch: int) -> list[tuple[triton.JITFunction, dict, dict, dict]]:
    """Return (kernel, signature, constants, options) of everything that is launched at common sizes."""
    pointers = ("transition", "increment", "initial", "entering", "final")
    signature = {f"{name}_ptr": "*fp32" for name in pointers}
    signature |= {"first_ptr": "*i64", "last_ptr": "*i64", "empty_ptr": "*i1", "reset_ptr": "*i1", "num_heads": "i32"}
    cases = []
    for dim in (64, 128, 256):
        for columns in (1, dim):
            for reverse in (False, True):
                # With the extra columns that begin_spans adds.
                kernel, _, constants, options = _choose(dim, dim + columns, columns)
                flags = {"HAS_INITIAL": True, "HAS_RESETS": True, "REVERSE": reverse}
                cases.append((kernel, signature, constants | flags, options))
    return cases
