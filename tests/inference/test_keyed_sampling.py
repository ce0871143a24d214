"""Tokens drawn in a batch: their shares, their log-probabilities, and what they depend on."""

import pytest
import torch

from megatron_sse.inference import sampling
from megatron_sse.inference.sampling import KeyedSampler, make_key, uniform

LOGITS = torch.tensor([0.0, 1.0, 2.0, -1.0, 9.0])


def draw(sampler: KeyedSampler, number: int = 4000) -> tuple[torch.Tensor, torch.Tensor]:
    keys = torch.tensor([make_key(1, 2, 3, sample) for sample in range(number)])
    return sampler.draw(LOGITS.expand(number, -1), keys, torch.zeros(number, dtype=torch.int64))


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (1.0, 0.8)])
def test_shares(temperature: float, top_p: float) -> None:
    tokens, logp = draw(KeyedSampler(4, temperature, top_p))
    full = (LOGITS[:4] / temperature).softmax(-1)
    kept = full if top_p == 1 else torch.where(full > 0.1, full, 0.0)
    shares = torch.bincount(tokens, minlength=4) / len(tokens)
    # Three standard deviations of 4,000 draws are 0.024 at most.
    assert torch.allclose(shares, kept / kept.sum(), atol=0.024)
    assert torch.allclose(logp, full.log()[tokens]) and tokens.max() < 4


def test_numbers_next_to_one_lead_to_no_token_without_a_probability(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "uniform", lambda keys, counts: torch.full((len(keys),), 1 - 2.0**-53).double())
    logits = torch.tensor([[0.0, 1.0, -torch.inf], [0.0, -torch.inf, -torch.inf]]).double()
    zeros = torch.zeros(2, dtype=torch.int64)
    tokens, logp = KeyedSampler(3).draw(logits, zeros, zeros)
    assert tokens.tolist() == [1, 0] and logp.isfinite().all()
    tokens, _ = KeyedSampler(3, 1.0, 0.5).draw(logits, zeros, zeros)
    assert tokens.tolist() == [1, 0]


def test_greedy() -> None:
    tokens, _ = draw(KeyedSampler(4, 0.0), 3)
    assert tokens.tolist() == [2] * 3


def test_random_numbers_depend_on_key_and_place_alone() -> None:
    keys = torch.tensor([make_key(7, 1, place, sample) for place in range(40) for sample in range(50)])
    counts = torch.arange(len(keys)) % 5
    values = uniform(keys, counts)
    assert values.min() >= 0 and values.max() < 1 and len(values.unique()) == len(keys)
    assert abs(values.mean() - 0.5) < 0.02 and abs(values.var() - 1 / 12) < 0.005
    order = torch.randperm(len(keys))
    assert torch.equal(uniform(keys[order], counts[order]), values[order])
    # splitmix64's first number for seed 0 (0xe220a8397b1dcdaf), by its authors.
    [first] = uniform(torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)).tolist()
    assert first == (0xE220A8397B1DCDAF >> 11) * 2.0**-53
