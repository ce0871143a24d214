"""Commands that work on files and settings give their first line without torch, whose import takes seconds."""

import subprocess
import sys

import pytest
import torch

# All in one process, whose start takes longer than the imports.
PROGRAM = """
import sys
from importlib import import_module
from megatron_sse.doctor.command import find_all
from megatron_sse.doctor.request import Request

def check(where, *modules):
    loaded = {*modules} & sys.modules.keys()
    assert not loaded, f"{where}: {loaded}"

ROOMS = "init entry planning doctor data.builder data data.train_tokenizer checkpoint plot"
for room in ROOMS.split():
    import_module(f"megatron_sse.{room}.command")
    check(room, "torch", "megatron.core", "matplotlib", "transformers")
findings = find_all(Request(config="configs/quickstart.yaml"))
next(findings)
check("the doctor's first line", "torch")
list(findings)
check("doctor", "megatron.core", "torch.distributed.checkpoint")
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="of a GPU the doctor asks Megatron-Core")
def test_files_and_settings_do_without_torch() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
