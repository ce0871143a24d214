"""One micro-batch in the form that the model takes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_sse.data.dataset import Sample
from megatron_sse.parallel.device import to_device
from megatron_sse.parallel.layout import TokenLayout
from megatron_sse.parallel.sharding import ContextShard


@dataclass
class Batch:
    """This context rank's part of a micro-batch.

    Attributes:
        tokens_BL, labels_BL: int64 [B, L], tokens and what should follow each: the next token, or a task's answer.
        loss_mask_BL: float32 [B, L], 0 where the label does not count.
        layout: the documents of the batch.
        loss_tokens: number of labels that count, on all context ranks together.
        answers_BL: bool [B, L], the labels that are answers of a task; None where no sample is of a task.
    """

    tokens_BL: Tensor
    labels_BL: Tensor
    loss_mask_BL: Tensor
    layout: TokenLayout
    loss_tokens: int
    answers_BL: Tensor | None = None


def make_batch(
    samples: list[Sample],
    reset_at_documents: bool,
    device: torch.device | str = "cpu",
    shard: ContextShard | None = None,
) -> Batch:
    """Make a batch of samples, or one context rank's part of it.

    With `reset_at_documents` the first token of a document is no label, since no token before it is of its document.
    Without, each sequence is one document.
    """
    tokens_BE1 = np.stack([sample.tokens_E1 for sample in samples])
    labels_BE1 = np.stack([sample.tokens_E1 if sample.labels_E1 is None else sample.labels_E1 for sample in samples])
    starts_BE1 = np.stack([sample.starts_E1 for sample in samples])
    counts_BE1 = np.stack([sample.counts_E1 for sample in samples])
    if not reset_at_documents:
        starts_BE1 = np.zeros_like(starts_BE1)
    # Labels are shifted before the split over ranks: that of a part's last token is the next part's first token.
    tokens_BE, labels_BE = tokens_BE1[:, :-1], labels_BE1[:, 1:]
    counts_BE = counts_BE1[:, 1:] & ~starts_BE1[:, 1:]
    real_BE = np.arange(tokens_BE.shape[1]) < np.array([[sample.length] for sample in samples])
    answers_BE = counts_BE & np.array([[sample.of_task] for sample in samples])
    column_L = (shard or ContextShard()).columns(tokens_BE.shape[1])
    return Batch(
        tokens_BL=to_device(tokens_BE[:, column_L], device),
        labels_BL=to_device(labels_BE[:, column_L], device),
        loss_mask_BL=to_device(counts_BE[:, column_L].astype(np.float32), device),
        layout=TokenLayout.from_starts(starts_BE1[:, :-1], None if real_BE.all() else real_BE, device, shard),
        loss_tokens=int(counts_BE.sum()),
        answers_BL=to_device(answers_BE[:, column_L], device) if answers_BE.any() else None,
    )
