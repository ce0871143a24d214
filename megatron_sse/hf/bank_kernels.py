"""The function of this package that exported models call: its kernels, for the recurrences of a layer.

Exports are kept and this package is updated: a function here keeps its arguments and its meaning for good. What changes
gets a new name; an export that does not find its function computes in plain torch.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from megatron_sse.kernels import BankInputs, Routes, join_routes, route, sse_attention


def run_banks(
    banks: Sequence[Sequence[Any]],
    v_THV: Tensor,
    prob_TrN: Tensor | None,
    initial_BAHKV: Tensor | None,
    offsets_B1: Tensor,
    sequence_T: Tensor,
    document_T: Tensor | None,
    settings: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """Return the sum over the banks [T, H, V] in v's dtype, and the states [B, A, H, K, V] at the sequences' ends.

    Args:
        banks: of the shared bank and, where there are partitions, of the sparse ones: queries and keys of the key
            heads, after their maps, log decays, write strengths (None without the delta rule); see BankInputs.
        v_THV: values.
        prob_TrN: the probabilities of one router or two, that of writes first; None without partitions.
        initial_BAHKV: the states that enter the sequences; None for zeros.
        offsets_B1, sequence_T: int64, the sequences' offsets over the tokens, and each token's sequence.
        document_T: int64, each token's document, where sequences hold several; only the first continues the state that
            enters. None where each sequence is one.
        settings: the section model.sse of a run.
    """
    shared, *sparse = (BankInputs(*bank) for bank in banks)
    routes = None if prob_TrN is None else _routes(prob_TrN, settings)
    gate = settings["gate"] if shared.recurrence.delta_rule else "post_norm"
    weight_writes = settings["weight_writes"]
    if gate == "beta":
        if weight_writes and routes is not None and sparse[0].beta_TH is not None:
            # There is one writer: the first pick.
            sparse = [replace(sparse[0], beta_TH=sparse[0].beta_TH * routes.weight_TP[:, :1])]
        gate, weight_writes = "post_norm", False
    outputs = sse_attention(
        shared,
        sparse[0] if sparse else None,
        v_THV,
        routes,
        offsets_B1,
        sequence_T,
        document_T,
        form=settings["form"],
        gate=gate,
        weight_writes=weight_writes,
        weight_reads=settings["weight_reads"],
        initial_YAHKV=initial_BAHKV,
    )
    assert outputs.final_YAHKV is not None
    return outputs.o_THV, outputs.final_YAHKV


def _routes(prob_TrN: Tensor, settings: dict[str, Any]) -> Routes:
    counts = settings["num_writers"], settings["num_readers"]
    probs = prob_TrN.unbind(1)
    if len(probs) == 1:
        routes = route(probs[0], *counts)
    else:
        routes = join_routes(*(route(prob, count, count) for prob, count in zip(probs, counts, strict=True)))
    return replace(routes, weight_TP=settings["weight_scale"] * routes.weight_TP)
