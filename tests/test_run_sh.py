"""run.sh on a machine with a GPU, with stand-ins for nvidia-smi, Python and pip."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Serves as python3, and as the .venv's python after `-m venv`. Writes what pip installs, and with which variables.
PYTHON = r"""#!/usr/bin/env bash
here=$(dirname "$STAND_IN")
case "$*" in
  "-m venv "*)
    mkdir -p "$3/bin" "$3/lib/python3.11/site-packages/nvidia"
    cp "$STAND_IN" "$3/bin/python" ;;
  *"pip --version" | --version) echo 3.11 ;;
  *"-m pip "*install*)
    echo "$CUDA_HOME|$CPLUS_INCLUDE_PATH|$MAX_JOBS|${*: -1}" >>"$here/installed"
    if [[ "$*" == *"[gpu]"* ]] && [ -e "$here/broken" ]; then
      cat "$here/broken"
      exit 1
    fi ;;
  "-c import torch, transformer_engine"*)
    [ ! -e "$here/not_importable" ] || { cat "$here/not_importable"; exit 1; } ;;
  "-m megatron_sse train"*) echo "launched ${*:4}" ;;
  -c*) exit 0 ;;
  *) echo "unexpected: $*" >&2; exit 1 ;;
esac
"""
# As pip -v prints it.
COMPILER = """\
  [1/28] c++ -c csrc/extensions/apply_rope.cpp -o apply_rope.o
  FAILED: apply_rope.o
  /x/torch/include/ATen/cuda/CUDAContextLight.h:9:10: fatal error: cuda_runtime_api.h: No such file or directory
  RuntimeError: Error compiling objects for extension
ERROR: Could not build wheels for transformer_engine_torch
"""
IMPORT = """\
Traceback (most recent call last):
  File "<string>", line 1, in <module>
ImportError: libcudnn.so.9: undefined symbol: cudnnBackendExecute
"""


class Machine:
    """A checkout with run.sh alone, and a folder of commands that comes first in PATH."""

    def __init__(self, folder: Path, gpu: bool) -> None:
        self.folder, self.commands = folder / "checkout", folder / "commands"
        self.folder.mkdir()
        self.commands.mkdir()
        for name in ("run.sh", "constraints.txt", "setup.cfg"):
            shutil.copy(ROOT / name, self.folder)
        lists = "echo 'GPU 0: NVIDIA H100'" if gpu else "exit 9"
        for name, text in {"python3": PYTHON, "nvidia-smi": f"#!/bin/sh\n{lists}\n"}.items():
            (self.commands / name).write_text(text)
            (self.commands / name).chmod(0o755)

    def run(self) -> subprocess.CompletedProcess[str]:
        (self.commands / "installed").write_text("")
        environment = os.environ | {
            "PATH": f"{self.commands}:{os.environ['PATH']}",
            "STAND_IN": str(self.commands / "python3"),
        }
        for name in ("CUDA_HOME", "CPLUS_INCLUDE_PATH", "MAX_JOBS"):
            environment.pop(name, None)
        command = ["./run.sh", "some.yaml"]
        done = subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0 and done.stdout.endswith("launched some.yaml\n"), done.stderr
        return done

    def installed(self) -> dict[str, list[str]]:
        """Return what pip installed in the last call, with CUDA_HOME, CPLUS_INCLUDE_PATH and MAX_JOBS."""
        lines = (line.split("|") for line in (self.commands / "installed").read_text().splitlines())
        return {what.removeprefix(f"{self.folder}"): variables for *variables, what in lines}


def test_compiles_against_the_headers_of_torchs_wheels_and_is_done_once(tmp_path: Path) -> None:
    machine = Machine(tmp_path, gpu=True)
    said = machine.run()
    installed = machine.installed()
    home, include, jobs = installed["[gpu]"]
    nvidia = f"{machine.folder}/.venv/lib/python3.11/site-packages/nvidia"
    assert home == f"{nvidia}/cu13"
    assert include.split(":") == [f"{nvidia}/{part}/include" for part in ("cu13", "cudnn", "nccl")]
    assert 1 <= int(jobs) <= (os.cpu_count() or 1)
    assert installed["[dev]"] == ["", "", ""]
    assert "run.sh: compiling Transformer Engine (once" in said.stdout and not said.stderr
    again = machine.run()
    assert not machine.installed() and again.stdout == "launched some.yaml\n"


@pytest.mark.parametrize(
    ("kind", "text", "cause"),
    [
        ("broken", COMPILER, "fatal error: cuda_runtime_api.h: No such file or directory ("),
        ("broken", "Killed", "no error in the log ("),
        ("not_importable", IMPORT, "ImportError: libcudnn.so.9: undefined symbol: cudnnBackendExecute ("),
    ],
)
def test_the_run_starts_without_it_and_the_next_call_tries_again(
    tmp_path: Path, kind: str, text: str, cause: str
) -> None:
    machine = Machine(tmp_path, gpu=True)
    fault = machine.commands / kind
    fault.write_text(text)
    for call in (1, 2):
        said = machine.run()
        assert f"run.sh: Transformer Engine could not be installed: {cause}" in said.stderr
        assert len(said.stderr.splitlines()) == 1
        assert ("[dev]" in machine.installed()) == (call == 1) and "[gpu]" in machine.installed()
    fault.unlink()
    assert not machine.run().stderr
    machine.run()
    assert not machine.installed()


def test_a_machine_without_a_gpu_compiles_nothing(tmp_path: Path) -> None:
    machine = Machine(tmp_path, gpu=False)
    said = machine.run()
    assert "[gpu]" not in machine.installed() and "Transformer Engine" not in said.stdout + said.stderr
