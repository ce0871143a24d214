"""What the SSE layers report about themselves: sums on the device, read by the monitor when it logs."""

from torch import Tensor

from megatron_sse.kernels import Routes


class LayerMetrics:
    """Means over micro-batches since the last reset; nothing here waits for the device."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._count = 0

    def add(self, g: Tensor, routes: Routes | None, balance_loss: Tensor | None, final_DAHKV: Tensor) -> None:
        """Count one micro-batch: log decays of the shared bank, picks, balance loss, states after the documents."""
        values = {
            "decay": g.detach().float().exp().mean(),
            "state_norm": final_DAHKV.detach().float().norm(dim=(-2, -1)).mean(),
        }
        if routes is not None and balance_loss is not None:
            prob_TN = routes.prob_TN.detach()
            values["balance_loss"] = balance_loss.detach()
            values["entropy"] = -(prob_TN * prob_TN.clamp(min=1e-20).log()).sum(-1).mean()
            values["share_N"] = routes.scatter(routes.write_weight_TP(False)).mean(0) / routes.num_writers
        for name, value in values.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._count += 1

    def means(self) -> dict[str, Tensor]:
        """Return balance_loss, entropy (nats), share_N (of the writes, per partition), decay and state_norm.

        Empty before the first micro-batch.
        """
        return {name: value / self._count for name, value in self._sums.items()}
