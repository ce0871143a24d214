"""The kernels' tests once more, executed by ttsem: bounds, races and uninitialised memory of every launch are checked.

ttsem (the extra `ttsem`) runs what Triton's compiler makes of a kernel, where the interpreter runs its source.
"""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
TESTS = sorted(path.stem for path in HERE.glob("test_*.py") if path != Path(__file__))

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def ttsem_is_installed() -> None:
    assert importlib.util.find_spec("ttsem") is not None, "ttsem: not installed; CONTRIBUTING.md says how to"


def run(path: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ttsem.sanitize", "pytest", "-p", "no:cacheprovider", str(path), *options]
    root = HERE.parents[2]
    environment = os.environ | {"TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)


# Seeded bugs are faults. torch.compile starts a process of its own, which would want a GPU. ttsem makes torch say
# that all tensors are on a GPU, where the torch form that test_scan compares with also walks unused pieces, which hold
# random numbers there. It makes tensors of the meta device on the CPU, for which nothing is launched.
LEFT_OUT = ["-k", "not is_seen and not compiled_as_one_graph and not known_without_data"]
LEFT_OUT += ["--deselect", "tests/kernels/triton/test_scan.py::test_scan"]


@pytest.mark.parametrize("name", TESTS)
def test_no_fault(name: str) -> None:
    done = run(HERE / f"{name}.py", *LEFT_OUT)
    assert done.returncode == 0, done.stdout[-5000:]
    # Skipped tests would pass as well.
    assert re.search(r"^\d+ passed(, \d+ deselected)? in ", done.stdout, re.MULTILINE), done.stdout[-5000:]


def test_an_access_out_of_bounds_is_found() -> None:
    done = run(HERE / "out_of_bounds.py")
    assert done.returncode == 1 and "KernelFault" in done.stdout and "past the end" in done.stdout, done.stdout
