"""Known models that are special cases of the recurrence, and row-sparse keys."""

import pytest
import torch
from torch import Tensor

from megatron_sse.kernels import BankInputs, sse_attention

T, H, K, V = 75, 2, 8, 5


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def one_document(q: Tensor, k: Tensor, g: Tensor, v: Tensor, initial: Tensor | None = None) -> tuple[Tensor, Tensor]:
    packing = torch.tensor([0, T]), torch.zeros(T, dtype=torch.int64)
    out = sse_attention(BankInputs(q, k, g), None, v, None, *packing, initial_YAHKV=initial)
    return out.o_THV, out.final_YAHKV[0, 0]


@pytest.mark.parametrize("rate", [0.0, 0.1, 3.0])
def test_constant_decay_is_attention_with_a_decay_mask(rate: float) -> None:
    """Rate 0 gives plain linear attention, a rate per head gives RetNet or Lightning Attention."""
    q, k, v = normal(T, H, K), normal(T, H, K, seed=1), normal(T, H, V, seed=2)
    rate_H = rate * torch.tensor([1.0, 0.25], dtype=torch.float64)
    distance = torch.arange(T)[:, None] - torch.arange(T)
    mask_HTT = (-rate_H[:, None, None] * distance).exp().tril()
    expected = torch.einsum("thk,shk,hts,shv->thv", q, k, mask_HTT, v) * K**-0.5
    o, _ = one_document(q, k, -rate_H[:, None].expand(T, H, K), v)
    torch.testing.assert_close(o, expected, rtol=1e-11, atol=1e-12)


def test_a_key_of_one_minus_decay_is_hgrn2() -> None:
    q, v, forget = normal(T, H, K), normal(T, H, V, seed=2), normal(T, H, K, seed=3).sigmoid()
    state, expected = torch.zeros(H, K, V, dtype=torch.float64), []
    for t in range(T):
        state = forget[t, :, :, None] * state + (1 - forget[t, :, :, None]) * v[t, :, None]
        expected.append(torch.einsum("hk,hkv->hv", q[t], state) * K**-0.5)
    o, final = one_document(q, 1 - forget, forget.log(), v)
    torch.testing.assert_close(o, torch.stack(expected), rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(final, state, rtol=1e-11, atol=1e-12)


def test_a_row_that_is_neither_written_nor_decayed_keeps_its_state() -> None:
    """With row-sparse keys, rows outside a token's top k have key 0 and log decay 0."""
    picked = torch.zeros(T, H, K, dtype=torch.bool).scatter(-1, normal(T, H, K - 2).topk(3).indices, True)
    k, g = (x.masked_fill(~picked, 0) for x in (normal(T, H, K, seed=1), -normal(T, H, K, seed=4).exp()))
    initial = normal(1, 1, H, K, V, seed=5)
    _, final = one_document(normal(T, H, K), k, g, normal(T, H, V, seed=2), initial)
    assert torch.equal(final[:, -2:], initial[0, 0, :, -2:])
    assert not (final[:, :-2] == initial[0, 0, :, :-2]).any()
