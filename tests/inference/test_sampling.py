"""Sampling: which token is picked."""

import torch

from megatron_sse.inference.sampling import Sampler

LOGITS = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()[[2, 0, 3, 1]][None]  # the likeliest is token 1
PADDED = torch.cat((LOGITS, torch.full((1, 2), 50.0)), dim=-1)


def share(sampler: Sampler, num_draws: int = 2000) -> list[float]:
    picked = torch.tensor([sampler.pick(PADDED, [0])[0] for _ in range(num_draws)])
    return [(picked == token).float().mean().item() for token in range(6)]


def test_greedy() -> None:
    assert Sampler(4).pick(torch.cat((LOGITS, LOGITS.flip(-1))), [0, 1]) == [1, 2]
    assert Sampler(4).pick(PADDED, [0]) == [1]


def test_temperature() -> None:
    torch.testing.assert_close(share(Sampler(4, 1.0)), [0.15, 0.5, 0.05, 0.3, 0.0, 0.0], atol=0.04, rtol=0)
    assert share(Sampler(4, 0.1), 500)[1] > 0.98
    flat = share(Sampler(4, 100.0))
    assert all(abs(part - 0.25) < 0.04 for part in flat[:4]) and flat[4:] == [0, 0]


def test_top_p_keeps_the_fewest_tokens() -> None:
    assert share(Sampler(4, 1.0, 0.4), 200)[1] == 1
    torch.testing.assert_close(share(Sampler(4, 1.0, 0.6)), [0.0, 0.625, 0.0, 0.375, 0.0, 0.0], atol=0.04, rtol=0)
    assert share(Sampler(4, 1.0, 0.94))[2] == 0 < share(Sampler(4, 1.0, 0.94))[0]


def test_a_sequence_has_its_own_random_numbers() -> None:
    def draws(places: list[int], seed: int = 3) -> list[list[int]]:
        sampler = Sampler(4, 1.0, seed=seed)
        picked = [sampler.pick(LOGITS.expand(len(places), -1), places) for _ in range(50)]
        return [list(column) for column in zip(*picked, strict=True)]

    first, second = draws([0, 1])
    assert draws([1]) == [second] and draws([0]) == [first] and first != second
    assert draws([0], seed=4) != [first]
