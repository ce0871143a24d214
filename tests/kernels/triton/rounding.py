"""Errors of bf16: of the kernels, and of plain torch with matrix products in bf16."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_sse.kernels import routing, scan, sse
from tests.kernels.cases import Case, Inputs, errors, make_inputs, outputs_and_gradients
from tests.kernels.implementations import attention, oracle

_PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.bmm.default, torch.ops.aten.baddbmm.default)


class ProductsInBf16(TorchDispatchMode):
    """A mode that rounds inputs and outputs of matrix products, forward and backward; sums are in fp32."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function not in _PRODUCTS:
            return function(*args, **(kwargs or {}))
        rounded = [x.bfloat16().to(x.dtype) if isinstance(x, torch.Tensor) else x for x in args]
        out = function(*rounded, **(kwargs or {}))
        return out.bfloat16().to(out.dtype)


def mixed_inputs(case: Case, device: str) -> tuple[Inputs, Inputs]:
    """Return inputs as in training (queries, keys, values bf16; gates, router fp32), and the same numbers in fp64."""
    rounded = make_inputs(case).map(lambda x: x.bfloat16().double())
    mixed = rounded.map(lambda x: x.float()).to(device)
    assert mixed.sparse is not None
    for x in (mixed.shared.q_THK, mixed.shared.k_THK, mixed.sparse.q_THK, mixed.sparse.k_THK, mixed.v_THV):
        x.data = x.data.bfloat16()
    return mixed, rounded


def errors_of_bf16(case: Case, device: str = "cpu") -> dict[str, tuple[float, float]]:
    """Return, by output and gradient, the errors of the kernels and of plain torch against fp64."""
    mixed, rounded = mixed_inputs(case, device)
    expected = outputs_and_gradients(oracle, case, rounded)
    actual = outputs_and_gradients(attention("varlen"), case, mixed)
    # Plain torch runs on the CPU, where the backward pass runs in this thread, in which the mode applies.
    with ProductsInBf16(), pytest.MonkeyPatch.context() as patch:
        for module in (routing, scan, sse):
            patch.setattr(module, "use_triton", lambda x: False)
        plain = outputs_and_gradients(attention("varlen"), case, mixed.to("cpu"))
    ours = errors({name: x.cpu() for name, x in actual.items()}, expected)
    return {name: (ours[name], error) for name, error in errors(plain, expected).items()}
