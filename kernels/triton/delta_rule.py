"""Operators of the delta rule, made once for both decays: per head (gdn.py) and per channel (kda.py).

`inputs` and results hold rows at their own places (by token, by row); what is prepared holds them in sorted order.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from megatron_sse.kernels.triton.target import SHARED_LIMIT, Target, target_of

# Pointers to values in the dtype of products; those to other values are to fp32, but for tables.
PRODUCTS = (
    *("q1", "k1", "q2", "k2", "v", "inverse", "scores", "o", "states", "d", "grad_o", "grad_q", "grad_k", "grad_v"),
    *("grad_states", "grad_change", "grad_scores", "grad_met"),
)


class DeltaRuleInputs(NamedTuple):
    """The tensors that all operators read.

    q1_THK .. beta2_TH: of the shared bank (1) and of the sparse ones (2; the shared bank's again where there are none).
        q and k are normalised; g (log decay) and beta are fp32 per value head; KDA's g is [T, HV, K].
    v_THV: its number of heads is a multiple of the keys'; its dtype is that of all matrix products and of the output.
    writes_R, write_R, read_R: fp32, scales of g and beta (0 or 1), of v and of the output.
    row_R .. chunk_M: see Rows.
    """

    q1_THK: Tensor
    k1_THK: Tensor
    g1_TH: Tensor
    beta1_TH: Tensor
    q2_THK: Tensor
    k2_THK: Tensor
    g2_TH: Tensor
    beta2_TH: Tensor
    v_THV: Tensor
    writes_R: Tensor
    write_R: Tensor
    read_R: Tensor
    row_R: Tensor
    token_R: Tensor
    run_R: Tensor
    chunk_start_G: Tensor
    chunk_end_G: Tensor
    piece_start_M: Tensor
    piece_end_M: Tensor
    chunk_M: Tensor

    @property
    def dims(self) -> "Dims":
        """Heads, their dims and the dtype of products."""
        (_, num_heads, key_dim), (_, num_value_heads, value_dim) = self.q1_THK.shape, self.v_THV.shape
        return Dims(num_heads, num_value_heads, value_dim, key_dim, self.v_THV.dtype)

    def empty_states(self, like: Tensor, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return an uninitialised state [HV, K, columns] for each element of `like`."""
        shape = (like.shape[0], self.dims.num_value_heads, self.dims.key_dim, columns)
        return self.v_THV.new_empty(shape, dtype=dtype)

    def empty_rows(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Return an uninitialised array of `shape` for each head and row, [HV, R, *shape], rows in sorted order."""
        return self.v_THV.new_empty(self.dims.num_value_heads, self.row_R.shape[0], *shape, dtype=dtype)


@dataclass(frozen=True)
class Dims:
    """Heads, their dims, and the dtype of the matrix products."""

    num_heads: int
    num_value_heads: int
    value_dim: int
    key_dim: int
    dtype: torch.dtype


class Operators(NamedTuple):
    """Custom operators whose first arguments are inputs, the number of tokens, and what is prepared."""

    summarize: Callable[..., tuple[Tensor, Tensor]]
    attend: Callable[..., Tensor]
    summarize_backward: Callable[..., Tensor]
    again: Callable[..., tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Kernels:
    """The kernels of a recurrence, and how they are launched.

    Attributes:
        summarize, attend, states_backward: kernels with programs for each piece.
        per_chunk: kernels with programs for each chunk.
        in_key_blocks: the one of them with a program for each block of keys.
        over_heads: the one of which each program takes all heads; None where there is none.
        prepared: names of what the recurrence's `prepare` returns, in this order.
        products: names of pointers to values in the dtype of products, besides PRODUCTS.
        plan: from kernel, dims and target to constants and launch options.
    """

    summarize: triton.JITFunction
    attend: triton.JITFunction
    states_backward: triton.JITFunction
    per_chunk: tuple[triton.JITFunction, ...]
    in_key_blocks: triton.JITFunction
    over_heads: triton.JITFunction | None
    prepared: tuple[str, ...]
    products: tuple[str, ...]
    plan: Callable[[triton.JITFunction, Dims, Target], tuple[dict, dict]]

    @property
    def per_piece(self) -> tuple[triton.JITFunction, ...]:
        return self.summarize, self.attend, self.states_backward

    def named(self, prepared: Sequence[Tensor]) -> dict[str, Tensor]:
        """Return what is prepared by name."""
        return dict(zip(self.prepared, prepared, strict=True))

    def launch(
        self,
        kernel: triton.JITFunction,
        inputs: DeltaRuleInputs,
        num_tokens: int,
        tensors: dict[str, Tensor],
        store: bool = False,
    ) -> None:
        """Launch a kernel: a program for each chunk or piece, value head and block.

        The grid has one dimension, in which the block varies fastest, then the head: with 2 heads and 3 blocks, program
        4 is (chunk 0, head 1, block 1). `tensors`, like the inputs, are named as the kernel's pointers, with dims at
        the end.
        """
        dims = inputs.dims
        constants, options = self.plan(kernel, dims, target_of(inputs.v_THV.device))
        if "STORE" in constants:
            constants["STORE"] = store
        named = {name.rpartition("_")[0] + "_ptr": x.contiguous() for name, x in (inputs._asdict() | tensors).items()}
        sizes = {"num_tokens": num_tokens, "num_rows": inputs.row_R.shape[0]}
        # Triton needs a pointer for every argument; one that this variant does not read or write may be any tensor.
        named = {name: named.get(name, inputs.v_THV) for name in kernel.arg_names if name.endswith("_ptr")}
        named |= {name: size for name, size in sizes.items() if name in kernel.arg_names}
        blocks = 1
        if kernel is self.in_key_blocks:
            blocks = triton.cdiv(dims.key_dim, constants["BK"])
        if kernel in self.per_piece:
            blocks = triton.cdiv(dims.value_dim, constants["BV"])
        # Blocks of columns of the increment [K, V] and then of the transition [K, K].
        if kernel is self.summarize:
            blocks += triton.cdiv(dims.key_dim, constants["BV"])
        spans = inputs.piece_start_M if kernel in self.per_piece else inputs.chunk_start_G
        heads = 1 if kernel is self.over_heads else dims.num_value_heads
        num_programs = spans.shape[0] * heads * blocks
        if num_programs:
            kernel[(num_programs,)](**named, **constants, **options)

    def compile_cases(self, arch: int) -> list[tuple[triton.JITFunction, dict[str, str], dict, dict]]:
        """Return (kernel, signature, constants, options) of everything that is launched at common sizes."""
        cases, target = [], Target(arch, SHARED_LIMIT[arch])
        for dtype in (torch.bfloat16, torch.float32):
            for dim in (64, 128, 256):
                for kernel in self.per_chunk + self.per_piece:
                    constants, options = self.plan(kernel, Dims(8, 8, dim, dim, dtype), target)
                    for store in (False, True) if "STORE" in constants else (None,):
                        variant = constants if store is None else constants | {"STORE": store}
                        cases.append((kernel, self._signature(kernel, constants, dtype), variant, options))
        return cases

    def _signature(self, kernel: triton.JITFunction, constants: dict, dtype: torch.dtype) -> dict[str, str]:
        """Return Triton's types of a kernel's arguments; those not named here are fp32."""
        named = {
            {torch.float32: "*fp32", torch.bfloat16: "*bf16"}[dtype]: PRODUCTS + self.products,
            "*i64": ("chunk_start", "chunk_end", "piece_start", "piece_end", "chunk"),
            "*i32": ("row", "token", "run"),
        }
        types = {f"{name}_ptr": kind for kind, names in named.items() for name in names}
        types |= {"num_tokens": "i32", "num_rows": "i32"} | dict.fromkeys(constants, "constexpr")
        return {name: types.get(name, "*fp32") for name in kernel.arg_names}


def register(name: str, kernels: Kernels) -> Operators:
    """Register a recurrence's operators as megatron_sse::NAME_summarize and so on."""
    return Operators(*(make(name, kernels) for make in (_summarize, _attend, _summarize_backward, _again)))


def _summarize(name: str, kernels: Kernels) -> Any:
    def empty(inputs, num_tokens, prepared):
        x = DeltaRuleInputs(*inputs)
        return tuple(x.empty_states(x.piece_start_M, columns) for columns in (x.dims.key_dim, x.dims.value_dim))

    @torch.library.custom_op(f"megatron_sse::{name}_summarize", mutates_args=())
    def summarize(inputs: Sequence[Tensor], num_tokens: int, prepared: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Return what pieces do to the states that enter them: transition [M, HV, K, K], increment [M, HV, K, V]."""
        transition_MHKK, increment_MHKV = empty(inputs, num_tokens, prepared)
        results = {"transition_MHKK": transition_MHKK, "increment_MHKV": increment_MHKV}
        kernels.launch(kernels.summarize, DeltaRuleInputs(*inputs), num_tokens, kernels.named(prepared) | results)
        return transition_MHKK, increment_MHKV

    summarize.register_fake(empty)
    return summarize


def _attend(name: str, kernels: Kernels) -> Any:
    def empty(inputs, num_tokens, prepared, entering_MHKV):
        x = DeltaRuleInputs(*inputs)
        return x.v_THV.new_empty(x.row_R.shape[0], *x.v_THV.shape[1:])

    @torch.library.custom_op(f"megatron_sse::{name}_attend", mutates_args=())
    def attend(inputs: Sequence[Tensor], num_tokens: int, prepared: Sequence[Tensor], entering_MHKV: Tensor) -> Tensor:
        """Return the outputs [R, HV, V] in v's dtype, given the states that enter the pieces."""
        o_RHV = empty(inputs, num_tokens, prepared, entering_MHKV)
        tensors = kernels.named(prepared) | {"entering_MHKV": entering_MHKV, "o_RHV": o_RHV}
        kernels.launch(kernels.attend, DeltaRuleInputs(*inputs), num_tokens, tensors)
        return o_RHV

    attend.register_fake(empty)
    return attend


def _summarize_backward(name: str, kernels: Kernels) -> Any:
    def empty(inputs, num_tokens, prepared, grad_o_RHV):
        x = DeltaRuleInputs(*inputs)
        return x.empty_states(x.piece_start_M, x.dims.value_dim)

    @torch.library.custom_op(f"megatron_sse::{name}_summarize_backward", mutates_args=())
    def summarize_backward(
        inputs: Sequence[Tensor], num_tokens: int, prepared: Sequence[Tensor], grad_o_RHV: Tensor
    ) -> Tensor:
        """Return the fp32 gradients [M, HV, K, V] of the entering states through each piece's own outputs."""
        grad_entering_MHKV = empty(inputs, num_tokens, prepared, grad_o_RHV)
        tensors = kernels.named(prepared) | {"grad_o_RHV": grad_o_RHV, "grad_entering_MHKV": grad_entering_MHKV}
        kernels.launch(kernels.states_backward, DeltaRuleInputs(*inputs), num_tokens, tensors)
        return grad_entering_MHKV

    summarize_backward.register_fake(empty)
    return summarize_backward


def _again(name: str, kernels: Kernels) -> Any:
    def empty(inputs, num_tokens, prepared, entering_MHKV):
        x = DeltaRuleInputs(*inputs)
        return x.empty_states(x.chunk_start_G, x.dims.value_dim, x.dims.dtype), x.empty_rows(x.dims.value_dim)

    @torch.library.custom_op(f"megatron_sse::{name}_again", mutates_args=())
    def again(
        inputs: Sequence[Tensor], num_tokens: int, prepared: Sequence[Tensor], entering_MHKV: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return what the backward pass needs of the forward pass, in v's dtype.

        These are the states that enter the chunks [G, HV, K, V] and what is written, by sorted position [HV, R, V].
        """
        states_GHKV, d_HRV = empty(inputs, num_tokens, prepared, entering_MHKV)
        tensors = {"entering_MHKV": entering_MHKV, "states_GHKV": states_GHKV, "d_HRV": d_HRV}
        tensors = kernels.named(prepared) | tensors
        kernels.launch(kernels.attend, DeltaRuleInputs(*inputs), num_tokens, tensors, store=True)
        return states_GHKV, d_HRV

    again.register_fake(empty)
    return again


def states_backward(
    kernels: Kernels,
    inputs: DeltaRuleInputs,
    num_tokens: int,
    prepared: Sequence[Tensor],
    again: Sequence[Tensor],
    grad_o_RHV: Tensor,
    grad_leaving_MHKV: Tensor,
) -> dict[str, Tensor]:
    """Take the leaving states' full gradients back to what each chunk wrote; return all tensors so far by name."""
    tensors = kernels.named(prepared) | dict(zip(("states_GHKV", "d_HRV"), again, strict=True))
    tensors |= {"grad_states_GHKV": torch.empty_like(again[0]), "grad_change_HRV": torch.empty_like(again[1])}
    tensors |= {"grad_o_RHV": grad_o_RHV, "grad_leaving_MHKV": grad_leaving_MHKV}
    kernels.launch(kernels.states_backward, inputs, num_tokens, tensors, store=True)
    return tensors


def empty_gradients(inputs, num_tokens, prepared, again, grad_o_RHV, grad_leaving_MHKV):
    """Return what an operator that takes gradients back returns, uninitialised: of q, k, g, beta, v, write and read."""
    x = DeltaRuleInputs(*inputs)
    by_token = (x.q1_THK, x.k1_THK, x.g1_TH, x.beta1_TH, x.v_THV)
    rows = x.row_R.shape[0]
    return *(y.new_empty(rows, *y.shape[1:]) for y in by_token), *(y.new_empty(rows) for y in (x.write_R, x.read_R))


def sum_groups(x_RHK: Tensor, num_heads: int) -> Tensor:
    """Return the sums over the value heads that share a key head, [R, H, K]."""
    return x_RHK if x_RHK.shape[1] == num_heads else x_RHK.unflatten(1, (num_heads, -1)).sum(2)
