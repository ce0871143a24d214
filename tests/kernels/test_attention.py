"""Attention of a sequence's last tokens, in its form for CPUs and in that for GPUs, against scores with a mask."""

import pytest
import torch

from megatron_sse.kernels import attention


@pytest.mark.parametrize("attend", ["attend_last", "_attend_lower_right"])
@pytest.mark.parametrize(("length", "num_keys", "groups"), [(7, 7, 2), (1, 9, 1), (5, 23, 4), (40, 41, 2), (3, 70, 1)])
def test_like_scores_with_a_mask(
    attend: str, length: int, num_keys: int, groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The form for GPUs takes two or more blocks of queries where it needs a mask.
    monkeypatch.setattr(attention, "MASK_ELEMENTS", 60)
    generator = torch.Generator().manual_seed(3)
    q, k, v = (
        torch.randn(2, heads, rows, 8, generator=generator, dtype=torch.float64)
        for heads, rows in ((4, length), (groups, num_keys), (groups, num_keys))
    )
    scores = torch.einsum("bhlk,bhsk->bhls", q, k.repeat_interleave(4 // groups, dim=1)) * 0.3
    hidden = torch.ones(length, num_keys, dtype=torch.bool).triu(num_keys - length + 1)
    seen = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    wanted = seen @ v.repeat_interleave(4 // groups, dim=1)
    # Off by 2e-16 in fp64, 2e-7 in fp32 and 5e-3 in bf16.
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 0.03)):
        got = getattr(attention, attend)(q.to(dtype), k.to(dtype), v.to(dtype), 0.3)
        assert got.dtype == dtype and (got - wanted).abs().max() < tolerance
