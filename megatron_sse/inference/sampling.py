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

    def pick(self, logits_DV: Tensor, slots: Sequence[int]) -> list[int]:
        """Return the next token of each of the sequences in `slots`."""
        logits_DV = logits_DV[:, : self.vocab_size].cpu().double()
        if self.temperature == 0:
            return logits_DV.argmax(-1).tolist()
        prob_DV, token_DV = (logits_DV / self.temperature).softmax(-1).sort(dim=-1, descending=True, stable=True)
        sum_DV = prob_DV.cumsum(-1)
        # Kept are the tokens whose predecessors sum to less than top_p.
        prob_DV = prob_DV.masked_fill(sum_DV - prob_DV >= self.top_p, 0)
        sum_DV = prob_DV.cumsum(-1)
        drawn_D1 = torch.tensor([[self._draw(slot)] for slot in slots], dtype=torch.float64) * sum_DV[:, -1:]
        place_D1 = torch.searchsorted(sum_DV, drawn_D1, right=True).clamp(max=(prob_DV > 0).sum(-1, keepdim=True) - 1)
        return token_DV.gather(-1, place_D1)[:, 0].tolist()

    def _draw(self, slot: int) -> float:
        if slot not in self._generators:
            self._generators[slot] = torch.Generator("cpu").manual_seed((self.seed << 20) + slot)
        return torch.rand((), generator=self._generators[slot], dtype=torch.float64, device="cpu").item()
