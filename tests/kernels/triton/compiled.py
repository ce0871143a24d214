"""Attention through torch.compile, run as a fresh process without compiled kernels: python -m ... RECURRENCE ..."""

import sys

import torch

from megatron_sse.kernels import routing, scan, sse
from tests.kernels.cases import Case, make_inputs, outputs_and_gradients
from tests.kernels.implementations import attention_in_spans


def check(recurrence: str) -> None:
    sizes = {"num_heads": 1, "num_value_heads": 1, "key_dim": 16, "value_dim": 16, "num_partitions": 2}
    case = Case(recurrence=recurrence, lengths=(3, 2), **sizes)
    inputs = make_inputs(case).map(lambda x: x.float())
    torch.compiler.reset()
    compiled = torch.compile(attention_in_spans("varlen"), backend="aot_eager", fullgraph=True)
    actual = outputs_and_gradients(compiled, case, inputs)
    expected = outputs_and_gradients(attention_in_spans("varlen"), case, inputs)
    assert all(torch.equal(actual[name], x) for name, x in expected.items()), recurrence


if __name__ == "__main__":
    for module in (routing, scan, sse):
        module.use_triton = lambda x: True
    for recurrence in sys.argv[1:]:
        check(recurrence)
