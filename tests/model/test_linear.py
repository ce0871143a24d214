"""Linear layers without a tensor group are Megatron-Core's: outputs and the gradient of every input and parameter."""

import pytest
import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_sse.model.linear import ColumnLinear, RowLinear
from megatron_sse.parallel.groups import init_groups
from tests.workers import run_workers

BASES = {ColumnLinear: ColumnParallelLinear, RowLinear: RowParallelLinear}


def results(kind: type, plain: bool, bias: bool, later: bool) -> list[Tensor]:
    """Return outputs and gradients of a layer, by its own forward or by that of its base class."""
    groups = init_groups()
    config = TransformerConfig(num_layers=1, hidden_size=6, num_attention_heads=1, use_cpu_initialization=True)
    split = {"gather_output": False} if kind is ColumnLinear else {"input_is_parallel": True}
    torch.manual_seed(0)
    init = torch.nn.init.normal_
    layer = kind(
        6,
        5,
        config=config,
        init_method=init,
        bias=bias,
        skip_bias_add=later,
        tp_group=groups.tp,
        is_expert=False,
        **split,
    )
    x = torch.randn(4, 2, 6, requires_grad=True)
    output, kept = layer(x) if plain else BASES[kind].forward(layer, x)
    assert (kept is not None) == (bias and later)
    (output + (0 if kept is None else kept)).square().sum().backward()
    return [output.detach(), x.grad, *(parameter.grad for parameter in layer.parameters())]


@pytest.mark.parametrize(("bias", "later"), [(False, True), (True, False), (True, True)])
@pytest.mark.parametrize("kind", BASES)
def test_like_megatrons(kind: type, bias: bool, later: bool) -> None:
    [expected], [found] = (run_workers(1, results, kind, plain, bias, later) for plain in (False, True))
    assert len(found) == 3 + bias
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y)
