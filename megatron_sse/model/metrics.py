"""What the SSE layers report about themselves: sums on the device, read by the monitor when it logs."""

import torch
from torch import Tensor

from megatron_sse.chunking import DECAYS_AT_ONCE
from megatron_sse.kernels import Routes


class LayerMetrics:
    """Means over micro-batches since the last reset; nothing here waits for the device."""

    def __init__(self) -> None:
        self.reset()

    def reset(self, detailed: bool = True) -> None:
        """Start again. detailed: whether all means are wanted; else only the balance loss, which is there anyhow."""
        self.detailed = detailed
        self._sums: dict[str, Tensor] = {}
        self._count = 0

    def add(self, g: Tensor, routes: Routes | None, balance_loss: Tensor | None, final_YAHKV: Tensor) -> None:
        """Count one micro-batch: log decays of the shared bank, picks, balance loss, states after documents."""
        values = {} if balance_loss is None else {"balance_loss": balance_loss.detach()}
        if self.detailed:
            values |= _describe(g.detach(), routes, final_YAHKV.detach())
        for name, value in values.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._count += 1

    def means(self) -> dict[str, Tensor]:
        """Return balance_loss and, where they were wanted, entropy (nats), share_N (of the writes), decay, state_norm.

        Empty before the first micro-batch.
        """
        return {name: value / self._count for name, value in self._sums.items()}


def _describe(g: Tensor, routes: Routes | None, final_YAHKV: Tensor) -> dict[str, Tensor]:
    values = {"decay": mean_decay(g), "state_norm": final_YAHKV.float().norm(dim=(-2, -1)).mean()}
    if routes is not None:
        prob_TN = routes.prob_TN.detach()
        values["entropy"] = -(prob_TN * prob_TN.clamp(min=1e-20).log()).sum(-1).mean()
        values["share_N"] = routes.scatter(routes.write_weight_TP(False)).mean(0) / routes.num_writers
    return values


def mean_decay(g: Tensor) -> Tensor:
    """Return the mean of exp(g) over all tokens T, the first dim, in fp32 and in bounded memory."""
    tokens = max(1, DECAYS_AT_ONCE // g[0].numel())
    parts = [part.float().exp().sum() for part in g.split(tokens)]
    return torch.stack(parts).sum() / g.numel()
