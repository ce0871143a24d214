"""A launcher does without Megatron-Core, whose import loads no compiler; fused functions are compiled when called."""

import subprocess
import sys

PROGRAM = """
import sys
import megatron_sse.launch.start
assert "megatron.core" not in sys.modules
import megatron_sse.training.loop
import torch
assert torch.compile.__module__ == "torch", torch.compile.__module__
assert "torch._dynamo" not in sys.modules and "torch._inductor" not in sys.modules
import inspect, megatron.core
assert inspect.getsource(megatron.core)
from megatron.core.fusions.fused_bias_swiglu import swiglu
from torch._dynamo.testing import CompileCounter
counter, at_once = CompileCounter(), torch.compile
torch.compile = lambda function: at_once(function, backend=counter)
gate, up = (torch.randn(4, 8) for _ in range(2))
x = torch.cat([gate, up], -1)
for _ in range(2):
    torch.testing.assert_close(swiglu(x), torch.nn.functional.silu(gate) * up)
print("compiled", counter.frame_count)
"""


def test_import() -> None:
    run = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert run.stdout.splitlines()[-1:] == ["compiled 1"], run.stderr
