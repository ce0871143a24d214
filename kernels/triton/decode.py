"""Decoding one token for each sequence: a program updates and reads its block of every bank that the token picked."""

import torch
import triton
import triton.language as tl
from torch import Tensor

OPTIONS = {"num_warps": 4}


@triton.jit
def _load_token(
    q_ptr,
    k_ptr,
    g_ptr,
    beta_ptr,
    token,
    head,
    H: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    DELTA: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Load q and k [K], the decay (a column [K, 1] with CHANNELS, else one number) and beta of one value head."""
    channel = tl.arange(0, BLOCK_K)
    key_row = (token * H + head // (HV // H)) * K
    b_q = tl.load(q_ptr + key_row + channel, mask=channel < K, other=0.0).to(tl.float32)
    b_k = tl.load(k_ptr + key_row + channel, mask=channel < K, other=0.0).to(tl.float32)
    value_row = token * HV + head
    if CHANNELS:
        # The delta rule's decays are those of value heads.
        gates = value_row * K if DELTA else key_row
        decay = tl.exp(tl.load(g_ptr + gates + channel, mask=channel < K, other=0.0).to(tl.float32))[:, None]
    else:
        decay = tl.exp(tl.load(g_ptr + value_row).to(tl.float32))
    beta = 1.0
    if DELTA:
        beta = tl.load(beta_ptr + value_row).to(tl.float32)
    return b_q, b_k, decay, beta


@triton.jit
def _normalize(b_x, scale):
    """Return scale x / |scale x|, as kernels.banks.l2_normalize does."""
    b_x *= scale
    return b_x * tl.rsqrt(tl.sum(b_x * b_x, axis=0) + 1e-6)


@triton.jit
def _write_and_read(
    state_ptr,
    cell,
    inside,
    b_q,
    b_k,
    decay,
    beta,
    b_v,
    write,
    read,
    K: tl.constexpr,
    DELTA: tl.constexpr,
    WRITES: tl.constexpr,
    BEFORE_NORM: tl.constexpr,
):
    """Update one bank's block of the state and return the token's output [V] from it."""
    if DELTA:
        if BEFORE_NORM:
            b_q, b_k = _normalize(b_q, read), _normalize(b_k, write)
            read, write = 1.0, 1.0
        else:
            b_q, b_k = _normalize(b_q, 1.0), _normalize(b_k, 1.0)
    b_state = tl.load(state_ptr + cell, mask=inside, other=0.0)
    if WRITES:
        b_state *= decay
        b_change = b_v * write
        if DELTA:
            # The delta rule writes the difference between the value and what the key recalls.
            b_change = (b_change - tl.sum(b_k[:, None] * b_state, axis=0)) * beta
        b_state += b_k[:, None] * b_change[None, :]
        tl.store(state_ptr + cell, b_state, mask=inside)
    scale: tl.constexpr = K**-0.5
    return tl.sum(b_q[:, None] * b_state, axis=0) * (read * scale)


@triton.jit
def decode_kernel(
    states_ptr,
    place_ptr,
    q1_ptr,
    k1_ptr,
    g1_ptr,
    beta1_ptr,
    q2_ptr,
    k2_ptr,
    g2_ptr,
    beta2_ptr,
    v_ptr,
    bank_ptr,
    weight_ptr,
    o_ptr,
    A: tl.constexpr,
    H: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    P: tl.constexpr,
    WRITERS: tl.constexpr,
    FIRST_READER: tl.constexpr,
    READERS: tl.constexpr,
    DELTA: tl.constexpr,
    CHANNELS: tl.constexpr,
    BEFORE_NORM: tl.constexpr,
    WEIGHT_WRITES: tl.constexpr,
    WEIGHT_READS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Compute the token's outputs and update its states; program (token, value head, block of V).

    A token in a negative place belongs to no sequence: its output is zero and no state changes.
    """
    num_blocks: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    program = tl.program_id(0)
    head = program // num_blocks % HV
    token = (program // (num_blocks * HV)).to(tl.int64)
    column = program % num_blocks * BLOCK_V + tl.arange(0, BLOCK_V)
    own = (token * HV + head) * V + column
    place = tl.load(place_ptr + token)
    if place < 0:
        tl.store(o_ptr + own, tl.zeros([BLOCK_V], o_ptr.dtype.element_ty), mask=column < V)
        return

    channel = tl.arange(0, BLOCK_K)
    # A program holds all K rows of its columns: what a key recalls is a sum over K.
    cell = channel[:, None] * V + column
    inside = (channel < K)[:, None] & (column < V)
    b_v = tl.load(v_ptr + own, mask=column < V, other=0.0).to(tl.float32)
    # The first bank's state of this head; the next bank's lies HV states further.
    state_ptr = states_ptr + (place * A * HV + head) * K * V
    b_q, b_k, decay, beta = _load_token(
        q1_ptr, k1_ptr, g1_ptr, beta1_ptr, token, head, H, HV, K, DELTA, CHANNELS, BLOCK_K
    )
    b_o = _write_and_read(state_ptr, cell, inside, b_q, b_k, decay, beta, b_v, 1.0, 1.0, K, DELTA, True, False)
    if P > 0:
        b_q, b_k, decay, beta = _load_token(
            q2_ptr, k2_ptr, g2_ptr, beta2_ptr, token, head, H, HV, K, DELTA, CHANNELS, BLOCK_K
        )
    for pick in tl.static_range(P):
        # bank_ptr and place_ptr hold int64: a pool may have more than 2^31 elements.
        picked_ptr = state_ptr + (1 + tl.load(bank_ptr + token * P + pick)) * HV * K * V
        weight = tl.load(weight_ptr + token * P + pick).to(tl.float32)
        write = weight if WEIGHT_WRITES else 1.0
        read = weight if WEIGHT_READS else 1.0
        b_picked = _write_and_read(
            picked_ptr, cell, inside, b_q, b_k, decay, beta, b_v, write, read, K, DELTA, pick < WRITERS, BEFORE_NORM
        )
        if pick >= FIRST_READER and pick < FIRST_READER + READERS:
            b_o += b_picked
    tl.store(o_ptr + own, b_o.to(o_ptr.dtype.element_ty), mask=column < V)


def _blocks(key_dim: int, value_dim: int) -> dict:
    block_k = triton.next_power_of_2(key_dim)
    return {"BLOCK_K": block_k, "BLOCK_V": min(triton.next_power_of_2(value_dim), max(16, 4096 // block_k))}


@torch.library.custom_op("megatron_sse::decode", mutates_args=("states_XAHKV",))
def decode(
    states_XAHKV: Tensor,
    place_T: Tensor,
    shared: list[Tensor],
    sparse: list[Tensor],
    v_THV: Tensor,
    bank_TP: Tensor | None,
    weight_TP: Tensor | None,
    num_writers: int,
    first_reader: int,
    num_readers: int,
    before_norm: bool,
    weight_writes: bool,
    weight_reads: bool,
) -> Tensor:
    """Launch decode_kernel and return its outputs.

    shared, sparse: q, k, g and, for the delta rule, beta; sparse is empty where there are no partitions.
    """
    _, num_banks, num_value_heads, key_dim, value_dim = states_XAHKV.shape
    blocks = _blocks(key_dim, value_dim)
    o_THV = torch.empty_like(v_THV)
    delta = len(shared) == 4
    # Triton needs a pointer for every argument; this one takes the place of beta, and is never read.
    unread = [] if delta else [shared[2]]
    decode_kernel[(o_THV.shape[0] * num_value_heads * triton.cdiv(value_dim, blocks["BLOCK_V"]),)](
        states_XAHKV,
        place_T,
        *shared,
        *unread,
        *(sparse or shared),
        *unread,
        v_THV,
        place_T if bank_TP is None else bank_TP,
        shared[2] if weight_TP is None else weight_TP,
        o_THV,
        A=num_banks,
        H=shared[0].shape[1],
        HV=num_value_heads,
        K=key_dim,
        V=value_dim,
        P=0 if bank_TP is None else bank_TP.shape[1],
        WRITERS=num_writers,
        FIRST_READER=first_reader,
        READERS=num_readers,
        DELTA=delta,
        CHANNELS=shared[2].dim() == 3,
        BEFORE_NORM=before_norm,
        WEIGHT_WRITES=weight_writes,
        WEIGHT_READS=weight_reads,
        **blocks,
        **OPTIONS,
    )
    return o_THV


@decode.register_fake
def _(states_XAHKV, place_T, shared, sparse, v_THV, *unused):
    return torch.empty_like(v_THV)


def compile_cases(arch: int) -> list[tuple[triton.JITFunction, dict, dict, dict]]:
    """Return (kernel, signature, constants, options) of everything that is launched at common sizes."""
    cases = []
    for dtype in ("*bf16", "*fp32"):
        signature = {"states_ptr": "*fp32", "place_ptr": "*i64"}
        for kind in (1, 2):
            signature |= {f"q{kind}_ptr": dtype, f"k{kind}_ptr": dtype, f"g{kind}_ptr": "*fp32"}
            signature |= {f"beta{kind}_ptr": "*fp32"}
        signature |= {"v_ptr": dtype, "bank_ptr": "*i64", "weight_ptr": "*fp32", "o_ptr": dtype}
        for dim in (64, 128, 256):
            for delta, channels in ((False, True), (True, False), (True, True)):
                constants = {"A": 5, "H": 16, "HV": 16, "K": dim, "V": dim, "P": 2, "WRITERS": 1}
                constants |= {"FIRST_READER": 0, "READERS": 2}
                constants |= {
                    "DELTA": delta,
                    "CHANNELS": channels,
                    "BEFORE_NORM": False,
                    "WEIGHT_WRITES": True,
                    "WEIGHT_READS": True,
                }
                cases.append((decode_kernel, signature, constants | _blocks(dim, dim), OPTIONS))
    return cases
