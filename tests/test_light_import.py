"""A launcher does without Megatron-Core, and a run without compilers; fused functions are compiled when called."""

import os
import subprocess
import sys
from pathlib import Path

from tests.launchers import free_port
from tests.training.support import small_run

# All in one process, whose start takes longer than the rest.
PROGRAM = """
import gc, os, sys
from importlib import import_module
from unittest import mock
from megatron_sse.cli import main

def loaded(*modules):
    return [name for name in modules if name in sys.modules]

with mock.patch("megatron_sse.launch.start.run_processes", return_value=0):
    assert main(["train", sys.argv[1]]) == 0
assert not loaded("megatron.core", "sympy"), "launcher"
assert gc.isenabled()
with mock.patch.dict(os.environ, RANK="0", WORLD_SIZE="1"):
    assert main(["train", sys.argv[1]]) == 0
for module in ("rl.run", "distill.run", "inference.run", "evaluation.perplexity", "inspection.measure"):
    import_module(f"megatron_sse.{module}")
assert not loaded("torch._dynamo", "torch._inductor", "wandb"), "run"
assert gc.isenabled() and gc.get_freeze_count() > 100_000
import torch
assert torch.compile.__module__ == "torch", torch.compile.__module__
import inspect, megatron.core, wandb
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


def test_import(tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    training = {"steps": 1, "global_batch_size": 1, "precision": "fp32"}
    config.write_text(small_run(tmp_path, training=training, parallel={"distributed_optimizer": True}).to_yaml())
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    program = [sys.executable, "-c", PROGRAM, str(config)]
    run = subprocess.run(program, env=os.environ | place, capture_output=True, text=True)
    assert run.stdout.splitlines()[-1:] == ["compiled 1"], run.stdout + run.stderr
