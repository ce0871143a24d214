"""The health of the SSE layers: collected on the ranks that hold them, averaged, and the same on every rank."""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_sse.config import ModelConfig
from megatron_sse.model.mixer import SSEMixer

# Names of the mixer's metrics, and their names in TensorBoard.
RECURRENT = {"decay": "mean_decay", "state_norm": "state_norm"}
ROUTED = {"entropy": "router_entropy", "balance_loss": "balance_loss"}


def collect_health(
    model: ModelConfig, model_chunks: list[torch.nn.Module], groups: ProcessGroupCollection, device: str
) -> dict[str, float]:
    """Return means over the micro-batches of the last step by TensorBoard name (sse/layer_03/router_entropy).

    Layers and partitions are counted from 1. Collective over the tensor, pipeline and data-parallel groups: every rank
    calls it.
    """
    names = [*RECURRENT, *ROUTED]
    # One row per layer: 1 (the count of this rank's means) and then the means. Rows of layers on other ranks are zero,
    # so that a sum over the ranks gives each layer the sum of its means and their number.
    rows_lc = torch.zeros(model.num_layers, 1 + len(names) + model.sse.num_partitions, device=device)
    for mixer in find_mixers(model_chunks):
        means = mixer.metrics.means()
        if not means:
            continue
        row_c = rows_lc[mixer.layer_number - 1]
        row_c[0] = 1
        for column, name in enumerate(names, start=1):
            if name in means:
                row_c[column] = means[name]
        if "share_N" in means:
            row_c[1 + len(names) :] = means["share_N"]
    for group in (groups.tp, groups.pp, groups.dp_cp):
        if group.size() > 1:
            dist.all_reduce(rows_lc, group=group)
    return name_means(model, rows_lc.cpu())


def find_mixers(model_chunks: list[torch.nn.Module]) -> list[SSEMixer]:
    """Return the SSE mixers on this rank."""
    return [module for chunk in model_chunks for module in chunk.modules() if isinstance(module, SSEMixer)]


def name_means(model: ModelConfig, rows_lc: Tensor) -> dict[str, float]:
    """Divide summed rows (count, scalars, shares) by their counts; return the means by TensorBoard name."""
    health: dict[str, float] = {}
    for layer, kind in enumerate(model.layer_kinds()):
        count, *values = rows_lc[layer].tolist()
        if kind == "softmax" or count == 0:
            continue
        means = [value / count for value in values]
        prefix = f"sse/layer_{layer + 1:02d}"
        routed = kind == "sse" and model.sse.num_partitions > 0
        titles = [*RECURRENT.values(), *(ROUTED.values() if routed else ())]
        health |= {f"{prefix}/{title}": mean for title, mean in zip(titles, means, strict=False)}
        if routed:
            shares = means[len(RECURRENT) + len(ROUTED) :]
            health |= {f"{prefix}/share_{partition + 1}": share for partition, share in enumerate(shares)}
    return health
