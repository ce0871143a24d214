"""One micro-batch as the model takes it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_sse.parallel.layout import TokenLayout, to_device


@dataclass
class Batch:
    """Attributes:
    tokens_BL, labels_BL: int64 [B, L], a token and the one after it.
    loss_mask_BL: float32 [B, L], 0 where the label does not count.
    layout: the documents of the batch.
    """

    tokens_BL: Tensor
    labels_BL: Tensor
    loss_mask_BL: Tensor
    layout: TokenLayout


def make_batch(
    samples: list[tuple[np.ndarray, np.ndarray]], reset_at_documents: bool, device: torch.device | str = "cpu"
) -> Batch:
    """Batch of samples (tokens int64 [L + 1], document starts bool [L + 1]).

    With `reset_at_documents` the first token of a document is no label: nothing before it belongs to it. Without, only
    sequences start documents and every label counts.
    """
    tokens_BL1 = np.stack([tokens for tokens, _ in samples])
    starts_BL1 = np.stack([starts for _, starts in samples])
    if not reset_at_documents:
        starts_BL1 = np.zeros_like(starts_BL1)
    return Batch(
        tokens_BL=to_device(np.ascontiguousarray(tokens_BL1[:, :-1]), device),
        labels_BL=to_device(np.ascontiguousarray(tokens_BL1[:, 1:]), device),
        loss_mask_BL=to_device((~starts_BL1[:, 1:]).astype(np.float32), device),
        layout=TokenLayout.from_starts(starts_BL1[:, :-1], device=device),
    )
