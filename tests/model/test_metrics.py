"""What layers measure about themselves: only when asked, and in memory that does not grow with the sequence."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_sse.kernels import route
from megatron_sse.model import metrics
from megatron_sse.model.metrics import LayerMetrics, mean_decay

T, H, K, N = 300, 2, 8, 4


class LargestResult(TorchDispatchMode):
    """The number of elements of the largest tensor that an operation makes; views make none."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and not out._is_view():
            self.elements = max(self.elements, out.numel())
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_mean_decay_is_exact_in_bounded_memory(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    g_THK = -torch.rand(T, H, K, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = g_THK.double().exp().mean()
    monkeypatch.setattr(metrics, "DECAYS_AT_ONCE", 7 * H * K)
    with LargestResult() as made:
        found = mean_decay(g_THK)
    assert float(found) == pytest.approx(float(expected), rel=1e-6)
    assert made.elements == 7 * H * K
    # Decays of one number per head, and those that are written once for all tokens.
    assert float(mean_decay(g_THK[:, :, 0])) == pytest.approx(float(g_THK[:, :, 0].double().exp().mean()), rel=1e-6)
    first = float(g_THK[0].double().exp().mean())
    assert float(mean_decay(g_THK[:1].expand(T, -1, -1))) == pytest.approx(first, rel=1e-6)


def test_only_the_balance_loss_is_kept_unless_health_is_reported() -> None:
    routes = route(torch.rand(T, N).softmax(-1), 1, 1)
    parts = torch.zeros(T, H, K), routes, torch.ones(()), torch.ones(1, 1 + N, H, K, K)
    layer = LayerMetrics()
    layer.reset(detailed=False)
    with LargestResult() as made:
        layer.add(*parts)
    assert layer.means().keys() == {"balance_loss"} and made.elements <= 1
    layer.reset(detailed=True)
    layer.add(*parts)
    assert layer.means().keys() == {"balance_loss", "decay", "state_norm", "entropy", "share_N"}
    assert float(layer.means()["decay"]) == 1 and float(layer.means()["state_norm"]) == K
