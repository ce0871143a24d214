"""All implementations with one signature: (inputs, routes, **options) -> output, final states."""

from collections.abc import Callable

import torch
from torch import Tensor

from megatron_sse.kernels import Edges, Routes, sse_attention
from megatron_sse.kernels.reference import reference_sse
from tests.kernels.cases import Inputs

FORMS = ("varlen", "mask")


def attention(form: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """Return the attention with a span for each document."""

    def function(inputs: Inputs, routes: Routes | None, initial_DAHKV: Tensor | None = None, **options):
        packing = (inputs.offsets_D1, inputs.document_T)
        options |= {"form": form, "initial_YAHKV": initial_DAHKV}
        out = sse_attention(inputs.shared, inputs.sparse, inputs.v_THV, routes, *packing, **options)
        return out.o_THV, out.final_YAHKV

    return function


def attention_in_spans(
    form: str, lengths: tuple[int, ...] = (), edges: Edges | None = None
) -> Callable[..., tuple[Tensor, Tensor]]:
    """Return the attention with spans of these lengths, in which documents are resets; all tokens are one span if none.

    It returns the final states of the last document alone, and takes initial states of the first one.
    """

    def function(inputs: Inputs, routes: Routes | None, initial_DAHKV: Tensor | None = None, **options):
        device = inputs.v_THV.device
        sizes = torch.tensor(lengths or (len(inputs.v_THV),), device=device)
        offsets = torch.nn.functional.pad(sizes.cumsum(0), (1, 0))
        span = torch.arange(len(sizes), device=device).repeat_interleave(sizes, output_size=len(inputs.v_THV))
        options |= {"form": form, "document_T": inputs.document_T, "edges": edges}
        options["initial_YAHKV"] = None if initial_DAHKV is None else initial_DAHKV[:1]
        out = sse_attention(inputs.shared, inputs.sparse, inputs.v_THV, routes, offsets, span, **options)
        return out.o_THV, out.final_YAHKV[-1:]

    return function


def oracle(inputs: Inputs, routes: Routes | None, **options) -> tuple[Tensor, Tensor]:
    return reference_sse(inputs.shared, inputs.sparse, inputs.v_THV, routes, inputs.offsets_D1, **options)


def oracle_in_spans(inputs: Inputs, routes: Routes | None, initial_DAHKV: Tensor | None = None, **options):
    """Do what attention_in_spans does."""
    if initial_DAHKV is not None:
        initial_DAHKV = torch.cat((initial_DAHKV[:1], torch.zeros_like(initial_DAHKV[1:])))
    o_THV, final_DAHKV = oracle(inputs, routes, initial_DAHKV=initial_DAHKV, **options)
    return o_THV, final_DAHKV[-1:]
