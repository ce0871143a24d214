"""Which tokens of a micro-batch belong to which document.

Dims: B batch, L tokens of a sequence, T = B * L flat tokens (t = b * L + l), D documents.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor


@dataclass(kw_only=True, eq=False)
class TokenLayout(PackedSeqParams):
    """Document metadata, made once per micro-batch on the host and passed to every layer.

    It travels as Megatron's `packed_seq_params`, the one argument that reaches each attention module.

    Attributes:
        batch_size, length, num_documents: B, L and D.
        max_document: tokens of the longest document.
        offsets_D1: int64 [D + 1], document d holds the flat tokens offsets[d] to offsets[d + 1].
        document_T: int64 [T], the document of each flat token.
        position_BL: int64 [B, L], position inside the document.
        real_BL: bool [B, L], False for padding; None where every token is real.
        layer_loss_scale: gradient of the losses that layers add themselves (the balance loss) before their
            coefficient; the trainer sets it, None leaves them out.
    """

    # Megatron's own attention would otherwise flatten the batch and read cu_seqlens.
    qkv_format: str = "sbhd"
    batch_size: int
    length: int
    num_documents: int
    max_document: int
    offsets_D1: Tensor
    document_T: Tensor
    position_BL: Tensor
    real_BL: Tensor | None = None
    layer_loss_scale: Tensor | None = None

    @classmethod
    def from_starts(
        cls, starts_BL: np.ndarray, real_BL: np.ndarray | None = None, device: torch.device | str = "cpu"
    ) -> TokenLayout:
        """Layout of a batch whose documents start where `starts_BL` (bool [B, L]) is True.

        Every sequence starts a document, whether marked or not. Sizes stay on the host and tensors are copied
        asynchronously, so nothing waits for the device. Raises ValueError on wrong shapes.
        """
        if starts_BL.ndim != 2 or starts_BL.size == 0:
            raise ValueError(f"starts_BL must be a non-empty [B, L] array, got shape {starts_BL.shape}")
        if real_BL is not None and real_BL.shape != starts_BL.shape:
            raise ValueError(f"real_BL has shape {real_BL.shape}, starts_BL {starts_BL.shape}")
        batch_size, length = starts_BL.shape
        starts_BL = starts_BL.astype(bool)
        starts_BL[:, 0] = True
        first_D = np.flatnonzero(starts_BL)
        offsets_D1 = np.append(first_D, starts_BL.size)
        sizes_D = np.diff(offsets_D1)
        document_T = np.repeat(np.arange(len(first_D)), sizes_D)
        position_T = np.arange(starts_BL.size) - first_D[document_T]
        return cls(
            batch_size=batch_size,
            length=length,
            num_documents=len(first_D),
            max_document=int(sizes_D.max()),
            offsets_D1=to_device(offsets_D1, device),
            document_T=to_device(document_T, device),
            position_BL=to_device(position_T.reshape(batch_size, length), device),
            real_BL=None if real_BL is None else to_device(real_BL.astype(bool), device),
        )


def to_device(array: np.ndarray, device: torch.device | str) -> Tensor:
    """Copy of a host array on `device`, without waiting for it."""
    tensor = torch.from_numpy(array)
    if torch.device(device).type == "cpu":
        return tensor
    # Only a copy from pinned memory is asynchronous.
    return tensor.pin_memory().to(device, non_blocking=True)
