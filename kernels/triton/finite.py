"""Finding inputs and entering states that are not finite, so that they reach no other document (kernels.resets)."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_sse.kernels.resets import LIMIT

OPTIONS = {"num_warps": 4}
CELLS = 4096


@triton.jit
def _find_bad(x_ptr, token, num_tokens, limit, WIDTH: tl.constexpr, BLOCK_C: tl.constexpr, GATE: tl.constexpr):
    """Check which tokens hold a number beyond the limit, or nan; of log decays (GATE), +inf or nan."""
    bad = tl.zeros([token.shape[0]], tl.int32)
    for first in range(0, WIDTH, BLOCK_C):
        column = first + tl.arange(0, BLOCK_C)
        mask = (token < num_tokens)[:, None] & (column < WIDTH)
        x = tl.load(x_ptr + token[:, None] * WIDTH + column, mask=mask, other=0.0).to(tl.float32)
        if GATE:
            fine = x < float("inf")
        else:
            fine = tl.abs(x) <= limit
        bad = tl.maximum(bad, tl.max((~fine).to(tl.int32), axis=1))
    return bad


@triton.jit(do_not_specialize=["num_tokens"])
def bad_tokens_kernel(
    q1_ptr,
    k1_ptr,
    g1_ptr,
    beta1_ptr,
    q2_ptr,
    k2_ptr,
    g2_ptr,
    beta2_ptr,
    v_ptr,
    bad_ptr,
    num_tokens,
    limit,
    KEYS: tl.constexpr,
    GATES: tl.constexpr,
    BETAS: tl.constexpr,
    VALUES: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Write whether a token's inputs to the shared bank (0) or to the partitions (1) are not finite, int32 [.., T].

    Program (block of tokens, kind of bank). KEYS .. VALUES: numbers of a token's queries, log decays, write strengths
    (0 for none) and values.
    """
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    kind = tl.program_id(1)
    q_ptr, k_ptr, g_ptr, beta_ptr = q1_ptr, k1_ptr, g1_ptr, beta1_ptr
    if kind == 1:
        q_ptr, k_ptr, g_ptr, beta_ptr = q2_ptr, k2_ptr, g2_ptr, beta2_ptr
    bad = _find_bad(g_ptr, token, num_tokens, limit, GATES, BLOCK_C, True)
    bad = tl.maximum(bad, _find_bad(q_ptr, token, num_tokens, limit, KEYS, BLOCK_C, False))
    bad = tl.maximum(bad, _find_bad(k_ptr, token, num_tokens, limit, KEYS, BLOCK_C, False))
    bad = tl.maximum(bad, _find_bad(v_ptr, token, num_tokens, limit, VALUES, BLOCK_C, False))
    if BETAS > 0:
        bad = tl.maximum(bad, _find_bad(beta_ptr, token, num_tokens, limit, BETAS, BLOCK_C, False))
    tl.store(bad_ptr + kind * num_tokens + token, bad, mask=token < num_tokens)


@triton.jit
def bad_states_kernel(state_ptr, bad_ptr, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Write whether a state holds inf or nan, int32; program (piece and head)."""
    base = state_ptr + tl.program_id(0).to(tl.int64) * SIZE
    bad = tl.zeros([BLOCK], tl.int32)
    for first in range(0, SIZE, BLOCK):
        cell = first + tl.arange(0, BLOCK)
        x = tl.load(base + cell, mask=cell < SIZE, other=0.0)
        bad = tl.maximum(bad, (~(tl.abs(x) < float("inf"))).to(tl.int32))
    tl.store(bad_ptr + tl.program_id(0), tl.max(bad, axis=0))


@triton.jit
def keep_finite_kernel(
    state_ptr,
    bad_ptr,
    piece_start_ptr,
    piece_end_ptr,
    row_ptr,
    token_ptr,
    run_ptr,
    spoiled_ptr,
    read_ptr,
    new_token_ptr,
    new_read_ptr,
    HEADS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Empty the piece's entering state where it is not finite, and spoil the rows that read it; program (piece)."""
    piece = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, BLOCK_H)
    bad = tl.max(tl.load(bad_ptr + piece * HEADS + head, mask=head < HEADS, other=0), axis=0) != 0
    if bad:
        for first in range(0, HEADS * SIZE, BLOCK):
            cell = first + tl.arange(0, BLOCK)
            tl.store(state_ptr + piece * HEADS * SIZE + cell, tl.zeros([BLOCK], tl.float32), mask=cell < HEADS * SIZE)
    start, end = tl.load(piece_start_ptr + piece), tl.load(piece_end_ptr + piece)
    run_before = tl.load(run_ptr + start - 1, mask=(start > 0) & (start < end), other=0)
    for first in range(start, end, BLOCK):
        position = first + tl.arange(0, BLOCK)
        mask = position < end
        row = tl.load(row_ptr + position, mask=mask, other=0)
        # Rows behind a reset in the piece do not read what entered it.
        reads = tl.load(run_ptr + position, mask=mask, other=0) == run_before
        spoiled = (tl.load(spoiled_ptr + position, mask=mask, other=0) != 0) | (reads & bad)
        token = tl.load(token_ptr + position, mask=mask, other=0)
        tl.store(new_token_ptr + position, tl.where(spoiled, -1, token), mask=mask)
        read = tl.load(read_ptr + row, mask=mask, other=0.0)
        tl.store(new_read_ptr + row, tl.where(spoiled, float("nan"), read), mask=mask)


def _bad_constants(gates: int, betas: int, keys: int, values: int) -> dict:
    widest = max(keys, values)
    block_c = min(1024, triton.next_power_of_2(widest))
    sizes = {"KEYS": keys, "GATES": gates, "BETAS": betas, "VALUES": values}
    return sizes | {"BLOCK_T": max(1, 4096 // block_c), "BLOCK_C": block_c}


@torch.library.custom_op("megatron_sse::bad_tokens", mutates_args=())
def bad_tokens(banks: Sequence[Tensor], v_THV: Tensor, num_kinds: int) -> Tensor:
    """Return which tokens have inputs to a kind of bank that are not finite, int32 [kinds, T].

    Args:
        banks: q, k, g (and beta) of the shared bank and of the partitions, [T, ...].
        num_kinds: 1 for the shared bank alone, 2 with partitions.
    """
    num_tokens, per_bank = len(v_THV), len(banks) // 2
    # Triton needs a pointer for every argument; without write strengths, nothing is read there.
    pointers = [x.contiguous() for half in (banks[:per_bank], banks[per_bank:]) for x in (*half, v_THV)[:4]]
    keys, gates, values = (x.numel() // num_tokens for x in (banks[0], banks[2], v_THV))
    constants = _bad_constants(gates, banks[3].numel() // num_tokens if per_bank == 4 else 0, keys, values)
    bad_ZT = torch.empty(num_kinds, num_tokens, dtype=torch.int32, device=v_THV.device)
    bad_tokens_kernel[(triton.cdiv(num_tokens, constants["BLOCK_T"]), num_kinds)](
        *pointers, v_THV.contiguous(), bad_ZT, num_tokens, LIMIT, **constants, **OPTIONS
    )
    return bad_ZT


@bad_tokens.register_fake
def _(banks, v_THV, num_kinds):
    return v_THV.new_empty(num_kinds, len(v_THV), dtype=torch.int32)


@torch.library.custom_op("megatron_sse::keep_finite", mutates_args=("entering_MHKV",))
def keep_finite(
    entering_MHKV: Tensor,
    piece_start_M: Tensor,
    piece_end_M: Tensor,
    row_R: Tensor,
    token_R: Tensor,
    run_R: Tensor,
    spoiled_R: Tensor,
    read_R: Tensor,
) -> tuple[Tensor, Tensor]:
    """Empty the states that enter pieces and hold inf or nan; return the tokens by position and `read` by row.

    Rows that read such a state, and those that are spoiled already, are read as zeros from here on (token -1), and
    with a factor of nan, which makes their outputs nan. Such a state counts as a whole, all heads of it.
    """
    num_pieces, num_heads, *dims = entering_MHKV.shape
    size = dims[0] * dims[1]
    token_R2, read_R2 = torch.empty_like(token_R), torch.empty_like(read_R)
    bad_MH = torch.empty(num_pieces, num_heads, dtype=torch.int32, device=row_R.device)
    bad_states_kernel[(num_pieces * num_heads,)](entering_MHKV, bad_MH, SIZE=size, BLOCK=CELLS, **OPTIONS)
    heads = {"HEADS": num_heads, "BLOCK_H": triton.next_power_of_2(num_heads)}
    keep_finite_kernel[(num_pieces,)](
        entering_MHKV,
        bad_MH,
        piece_start_M,
        piece_end_M,
        row_R,
        token_R,
        run_R,
        spoiled_R,
        read_R,
        token_R2,
        read_R2,
        SIZE=size,
        BLOCK=1024,
        **heads,
        **OPTIONS,
    )
    return token_R2, read_R2


@keep_finite.register_fake
def _(entering_MHKV, piece_start_M, piece_end_M, row_R, token_R, run_R, spoiled_R, read_R):
    return torch.empty_like(token_R), torch.empty_like(read_R)


def compile_cases(arch: int) -> list[tuple[triton.JITFunction, dict, dict, dict]]:
    """Return (kernel, signature, constants, options) of everything that is launched at common sizes."""
    tables = dict.fromkeys(("piece_start_ptr", "piece_end_ptr"), "*i64")
    tables |= dict.fromkeys(("row_ptr", "token_ptr", "run_ptr"), "*i32") | {"spoiled_ptr": "*i1", "read_ptr": "*fp32"}
    keep = {"state_ptr": "*fp32", "bad_ptr": "*i32"} | tables | {"new_token_ptr": "*i32", "new_read_ptr": "*fp32"}
    cases: list[tuple[triton.JITFunction, dict, dict, dict]] = []
    for dim in (64, 128, 256):
        size = {"SIZE": dim * dim}
        states = {"state_ptr": "*fp32", "bad_ptr": "*i32"}
        cases.append((bad_states_kernel, states, size | {"BLOCK": CELLS}, OPTIONS))
        cases.append((keep_finite_kernel, keep, size | {"HEADS": 16, "BLOCK_H": 16, "BLOCK": 1024}, OPTIONS))
    for dtype in ("*bf16", "*fp32"):
        for gates, betas in ((2048, 0), (16, 16)):
            inputs = {f"{name}{kind}_ptr": dtype for kind in (1, 2) for name in ("q", "k")}
            inputs |= {f"{name}{kind}_ptr": "*fp32" for kind in (1, 2) for name in ("g", "beta")}
            signature = inputs | {"v_ptr": dtype, "bad_ptr": "*i32", "num_tokens": "i32", "limit": "fp32"}
            cases.append((bad_tokens_kernel, signature, _bad_constants(gates, betas, 2048, 2048), OPTIONS))
    return cases
