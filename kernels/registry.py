"""The kernels of each recurrence. A new recurrence has a row here and one in megatron_sse.recurrence.

The oracle (reference.py) and the decode step (decode.py) follow the facts of that table and need no row.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from megatron_sse.kernels import gdn, gla, kda
from megatron_sse.kernels.banks import BankInputs
from megatron_sse.kernels.chunks import ChunkAction, run_chunks
from megatron_sse.kernels.resets import find_bad_rows
from megatron_sse.kernels.segments import Segments
from megatron_sse.recurrence import RECURRENCES

# What chunks of rows do in torch, from q, k, v, log decays and, for the delta rule, write strengths.
KERNELS: dict[str, Callable[..., ChunkAction]] = {"gla": gla.act, "gdn": gdn.act, "kda": kda.act}
if KERNELS.keys() != RECURRENCES.keys():
    raise ImportError(f"kernels of {sorted(KERNELS)}, recurrences {sorted(RECURRENCES)}")


def run_recurrence(
    bank: BankInputs, v_THV: Tensor, segments: Segments, initial_SHKV: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Run the recurrence that a bank's inputs say, in torch, restarted in every segment and where documents start.

    Args:
        bank: with as many key heads as value heads; keys of the delta rule normalised.
        v_THV: values of the rows.
        segments: which rows form which segment, in which order.
        initial_SHKV: the state that enters each segment; None for zeros.

    Returns:
        o_THV in v's dtype and final_SHKV; all arithmetic and the states are in fp32, or fp64 where an input is.
    """
    dtype, act = torch.promote_types(bank.q_THK.dtype, torch.float32), KERNELS[bank.recurrence.name]
    g = bank.g if bank.recurrence.channel_decay else bank.g[..., None]
    beta = [] if bank.beta_TH is None else [bank.beta_TH[..., None]]
    if segments.resets is not None:
        bad_R = find_bad_rows(g, bank.q_THK, bank.k_THK, v_THV, *beta)
        resets = segments.resets.spoil(segments.by_position(bad_R), segments.offsets_S1)
        segments = replace(segments, resets=resets)
        # Nothing is left of what was there before a document's first row.
        g = g.masked_fill(segments.by_row(resets.starts_R)[:, None, None], -torch.inf)
    rows = tuple(x.to(dtype) for x in (bank.q_THK, bank.k_THK, v_THV, g, *beta))
    o_THV, final_SHKV = run_chunks(act, rows, segments, initial_SHKV)
    return o_THV.to(v_THV.dtype), final_SHKV
