#!/usr/bin/env bash
# Train the model of a YAML file, or run the tests. The first call creates .venv and installs the pinned packages.
#   ./run.sh CONFIG [section.key=value ...]
#   ./run.sh test [pytest's arguments]
# On several machines run it on each, with NNODES, NODE_RANK, MASTER_ADDR (and MASTER_PORT), or under srun.
set -euo pipefail
# Without this trap, a package manager that exits by itself after Ctrl-C would let the script continue.
trap 'exit 130' INT

# The checkout, also where this script is called through a symbolic link.
root=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")
venv="$root/.venv"

has_gpu() { command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q '^GPU'; }

find_python() {
  local name
  for name in python3 python3.11 python3.12 python3.13; do
    if "$name" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$name"
      return
    fi
  done
  echo "run.sh: got $(python3 --version 2>&1 || true), allowed Python 3.11 or newer with the venv module" >&2
  exit 2
}

install() {
  local pip=("$venv/bin/python" -m pip --disable-pip-version-check --quiet --quiet)
  local pins="$root/constraints.txt" torch
  torch=$(sed -n 's/^torch==//p' "$pins")
  "${pip[@]}" install -c "$pins" setuptools
  if has_gpu; then
    # With three equal signs 2.1+cpu does not count as 2.1, so a CPU build is replaced.
    "${pip[@]}" install -c "$pins" "torch===$torch"
  else
    "${pip[@]}" install -c "$pins" "torch==$torch+cpu" 2>/dev/null || "${pip[@]}" install -c "$pins" "torch==$torch"
  fi
  "${pip[@]}" install -c "$pins" --no-build-isolation -e "$root[dev]"
}

# Transformer Engine's torch part comes as sources. It is compiled against the headers that torch's own wheels brought:
# only those are sure to be of the CUDA, cuDNN and NCCL that torch loads.
compile_transformer_engine() {
  local pip=("$venv/bin/python" -m pip --disable-pip-version-check) nvidia gigabytes jobs
  nvidia=$(echo "$venv"/lib/python3*/site-packages/nvidia)
  gigabytes=$(($(sed -n 's/^MemAvailable: *\([0-9]*\).*/\1/p' /proc/meminfo) / 1048576))
  # A compiler takes up to 3 GB.
  jobs=$((gigabytes / 3 < $(nproc) ? gigabytes / 3 : $(nproc)))
  export CUDA_HOME="$nvidia/cu13" PATH="$venv/bin:$PATH" MAX_JOBS="${MAX_JOBS:-$((jobs > 1 ? jobs : 1))}"
  CPLUS_INCLUDE_PATH="$nvidia/cu13/include:$nvidia/cudnn/include:$nvidia/nccl/include"
  export CPLUS_INCLUDE_PATH
  # The compiler that its build asks for its version, headers that torch leaves out, and what runs the jobs.
  "${pip[@]}" install -c "$root/constraints.txt" "cuda-toolkit[nvcc,cccl]" ninja &&
    # Not from pip's cache: what was compiled there for another torch has the same name.
    "${pip[@]}" install -c "$root/constraints.txt" --no-cache-dir --no-build-isolation -v -e "$root[gpu]" &&
    # After torch, as every run does: torch loads cuBLAS, which Transformer Engine alone does not find everywhere.
    "$venv/bin/python" -c 'import torch, transformer_engine.pytorch'
}

install_transformer_engine() {
  local log="$venv/transformer_engine.log" cause
  echo "run.sh: compiling Transformer Engine (once, 5 to 60 minutes; progress: tail -f $log)"
  if (compile_transformer_engine) >"$log" 2>&1; then
    echo "$1" >"$venv/transformer_engine"
    return
  fi
  # The first error is the cause; those of Python follow from it.
  cause=$(grep -m 1 -E 'fatal error: |: error: |: not found' "$log" ||
    grep -E '[A-Za-z]*Error: |^ *ERROR: ' "$log" | tail -1) || true
  cause=$(echo "${cause:-no error in the log}" | sed 's/^ *//; s/^[^ ]*: \(fatal error: \)/\1/')
  echo "run.sh: Transformer Engine could not be installed: $cause (the full log: $log). Plain modules are used, which are" \
    "slower. The next call tries again." >&2
}

setup() {
  local stamp="$venv/installed" wanted
  mkdir -p "$venv"
  # Take a lock: machines that share the folder install one after the other.
  exec 9>"$venv/lock"
  flock -n 9 || { echo "run.sh: waiting for another run.sh that is installing" && flock 9; }
  wanted=$(cat "$root/constraints.txt" "$root/setup.cfg" <(has_gpu && echo gpu || echo cpu) | sha256sum)
  if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
      local python
      python=$(find_python)
      echo "run.sh: creating $venv with $("$python" --version)"
      "$python" -m venv "$venv"
    fi
    echo "run.sh: installing the packages of constraints.txt (once, a few minutes)"
    install
    echo "$wanted" >"$stamp"
  fi
  # It has a stamp of its own, so that a failure neither counts as done nor keeps a run from starting.
  if has_gpu && [ "$(cat "$venv/transformer_engine" 2>/dev/null)" != "$wanted" ]; then
    install_transformer_engine "$wanted"
  fi
  exec 9>&-
}

usage() { sed -n '2,5s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }

case "${1:-}" in
  -h | --help) usage ;;
  "" | -*)
    usage >&2
    exit 2
    ;;
  test)
    shift
    setup
    cd "$root"
    # Run two test files at a time, since most tests compute in one thread.
    echo "OMP_NUM_THREADS=1 $venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $*"
    OMP_NUM_THREADS=1 exec "$venv/bin/python" -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
    ;;
  *)
    setup
    exec "$venv/bin/python" -m megatron_sse train "$@"
    ;;
esac
