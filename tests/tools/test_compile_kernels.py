"""Every kernel compiles for a Hopper GPU at the most common sizes, fits its shared memory and spills no registers."""

import os
import re
import subprocess
import sys


def test_defaults_compile_without_spills() -> None:
    command = [sys.executable, "-m", "megatron_sse.tools.compile_kernels"]
    command += ["--arch", "90", "--dim", "128", "--dtype", "bf16"]
    # In another process, since this one runs the kernels in the interpreter.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [line.split("|")[1:-1] for line in done.stdout.splitlines() if re.match(r"\| \w+_kernel ", line)]
    names = {row[0].strip() for row in rows}
    assert {"gla_output_kernel", "gdn_attend_kernel", "norm_forward_kernel", "conv_forward_kernel"} <= names
    spilled = [row for row in rows if int(row[5])]
    assert not spilled


def test_interpreted_kernels_are_refused() -> None:
    command = [sys.executable, "-m", "megatron_sse.tools.compile_kernels"]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (
        2,
        "TRITON_INTERPRET: got 1, allowed 0: interpreted kernels cannot be compiled\n",
    )
