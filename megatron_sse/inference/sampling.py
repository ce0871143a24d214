"""Which token comes next."""

from collections.abc import Sequence

import torch
from torch import Tensor


class Sampler:
    """Picks tokens by their logits.

    Every sequence has random numbers of its own: what it becomes does not depend on the others of its batch, and is
    the same on all tensor ranks.

    Args:
        vocab_size: tokens that may be picked; what pads the vocabulary may not.
        temperature: logits are divided by it; 0 takes the likeliest token.
        top_p: tokens are picked among the fewest likeliest that have this share of the probability.
        seed: of the random numbers.
    """

    def __init__(self, vocab_size: int, temperature: float = 0.0, top_p: float = 1.0, seed: int = 0):
        self.vocab_size, self.temperature, self.top_p, self.seed = vocab_size, temperature, top_p, seed
        self._generators: dict[int, torch.Generator] = {}

    def pick(self, logits_Dv: Tensor, places: Sequence[int]) -> list[int]:
        """Return the next token of each of the sequences in `places`."""
        logits_Dv = logits_Dv[:, : self.vocab_size].cpu().double()
        if self.temperature == 0:
            return logits_Dv.argmax(-1).tolist()
        prob_Dv, token_Dv = (logits_Dv / self.temperature).softmax(-1).sort(dim=-1, descending=True, stable=True)
        sum_Dv = prob_Dv.cumsum(-1)
        # Kept are the tokens whose predecessors sum to less than top_p.
        prob_Dv = prob_Dv.masked_fill(sum_Dv - prob_Dv >= self.top_p, 0)
        sum_Dv = prob_Dv.cumsum(-1)
        drawn_D1 = torch.tensor([[self._draw(place)] for place in places], dtype=torch.float64) * sum_Dv[:, -1:]
        rank_D1 = torch.searchsorted(sum_Dv, drawn_D1, right=True).clamp(max=(prob_Dv > 0).sum(-1, keepdim=True) - 1)
        return token_Dv.gather(-1, rank_D1)[:, 0].tolist()

    def _draw(self, place: int) -> float:
        if place not in self._generators:
            # Seeds of different sequences never meet: there are fewer than 2^20 of them.
            self._generators[place] = torch.Generator("cpu").manual_seed((self.seed << 20) + place)
        return torch.rand((), generator=self._generators[place], dtype=torch.float64, device="cpu").item()
