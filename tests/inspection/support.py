"""Expected output of `megatron-sse inspect-states`, by the oracle, from banks' inputs in the training forward pass."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_sse.kernels import BankInputs, Routes
from megatron_sse.kernels.reference import reference_sse
from megatron_sse.parallel import layout
from megatron_sse.pretrained.logits import compute_logits
from megatron_sse.pretrained.open import open_model


@dataclass(frozen=True)
class Handed:
    """The inputs of a layer's banks for a text."""

    shared: BankInputs
    sparse: BankInputs | None
    v_THV: Tensor
    routes: Routes | None
    options: dict[str, Any]

    def first(self, count: int) -> "Handed":
        """Return the part for the first tokens."""
        routes = self.routes and replace(
            self.routes, **{name: getattr(self.routes, name)[:count] for name in ("prob_TN", "bank_TP", "weight_TP")}
        )
        shared, sparse = (bank and bank.map(lambda x: x[:count]) for bank in (self.shared, self.sparse))
        return Handed(shared, sparse, self.v_THV[:count], routes, self.options)


def look_at(folder: Path, texts: list[list[int]]) -> list[list[Handed]]:
    """Return the inputs of the banks, for every SSE layer and text."""
    found: list[list[Handed]] = []
    original = layout.sse_attention

    def watch(shared, sparse, v_THV, routes, *rest, **options):
        names = ("gate", "weight_writes", "weight_reads")
        calls.append(Handed(shared, sparse, v_THV, routes, {name: options[name] for name in names}))
        return original(shared, sparse, v_THV, routes, *rest, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout, "sse_attention", watch)
        for text in texts:
            calls: list[Handed] = []
            compute_logits(open_model("", folder), torch.tensor([text]))
            found.append(calls)
    return [list(layer) for layer in zip(*found, strict=True)]


def ranks(handed: Handed) -> np.ndarray:
    """Return the effective rank of each bank's state [A], a mean over heads."""
    double = [bank and bank.map(lambda x: x.double()) for bank in (handed.shared, handed.sparse)]
    offsets_D1 = torch.tensor([0, len(handed.v_THV)])
    _, final = reference_sse(*double, handed.v_THV.double(), handed.routes, offsets_D1, **handed.options)
    found = []
    for state_HKV in final[0].numpy():
        value_Hs = np.linalg.svd(state_HKV, compute_uv=False)
        share_Hs = value_Hs / np.maximum(value_Hs.sum(-1, keepdims=True), 1e-300)
        log_Hs = np.log(np.where(share_Hs > 0, share_Hs, 1))
        found.append(np.where(value_Hs.sum(-1) > 0, np.exp(-(share_Hs * log_Hs).sum(-1)), 0).mean())
    return np.array(found)


def half_lives(g: Tensor) -> list[float]:
    """Return the half-lives of all heads and channels of some tokens."""
    return (np.log(2) / g.double().abs()).flatten().tolist()


def percentiles(values: list[float]) -> dict[str, float]:
    found = np.quantile(np.array(values), [0.1, 0.5, 0.9], method="inverted_cdf")
    return dict(zip(("p10", "p50", "p90"), found.tolist(), strict=True))
