"""All implementations with one signature: (inputs, routes, **options) -> output, final states."""

from collections.abc import Callable

from torch import Tensor

from megatron_sse.kernels import Routes, sse_attention
from megatron_sse.kernels.reference import reference_sse
from tests.kernels.cases import Inputs

FORMS = ("varlen", "mask")


def attention(form: str) -> Callable[..., tuple[Tensor, Tensor]]:
    def function(inputs: Inputs, routes: Routes | None, **options) -> tuple[Tensor, Tensor]:
        packing = (inputs.offsets_D1, inputs.document_T)
        out = sse_attention(inputs.shared, inputs.sparse, inputs.v_THV, routes, *packing, form=form, **options)
        return out.o_THV, out.final_DAHKV

    return function


def oracle(inputs: Inputs, routes: Routes | None, **options) -> tuple[Tensor, Tensor]:
    return reference_sse(inputs.shared, inputs.sparse, inputs.v_THV, routes, inputs.offsets_D1, **options)
