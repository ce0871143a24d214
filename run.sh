#!/usr/bin/env bash
# Train the model of a YAML file, or run the tests. The first call creates .venv and installs the pinned packages.
#   ./run.sh CONFIG [section.key=value ...]
#   ./run.sh test [pytest's arguments]
# On several machines run it on each, with NNODES, NODE_RANK, MASTER_ADDR (and MASTER_PORT), or under srun.
set -euo pipefail
# Without this trap, a package manager that exits by itself after Ctrl-C would let the script continue.
trap 'exit 130' INT

root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
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
    "${pip[@]}" install -c "$pins" --no-build-isolation -e "$root[gpu,dev]" && return
    echo "run.sh: the gpu extra did not install; without Transformer Engine plain modules are used, which are slower" >&2
  else
    "${pip[@]}" install -c "$pins" "torch==$torch+cpu" 2>/dev/null || "${pip[@]}" install -c "$pins" "torch==$torch"
  fi
  "${pip[@]}" install -c "$pins" --no-build-isolation -e "$root[dev]"
}

setup() {
  local stamp="$venv/installed" wanted
  mkdir -p "$venv"
  # Take a lock: machines that share the folder install one after the other.
  exec 9>"$venv/lock"
  flock 9
  wanted=$(cat "$root/constraints.txt" "$root/setup.cfg" <(has_gpu && echo gpu || echo cpu) | sha256sum)
  [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ] && exec 9>&- && return
  if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    local python
    python=$(find_python)
    echo "run.sh: makes $venv with $("$python" --version)"
    "$python" -m venv "$venv"
  fi
  echo "run.sh: installs the packages of constraints.txt (once, a few minutes)"
  install
  echo "$wanted" >"$stamp"
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
    echo "OMP_NUM_THREADS=1 $venv/bin/python -m pytest -n 2 --dist loadfile $*"
    OMP_NUM_THREADS=1 exec "$venv/bin/python" -m pytest -n 2 --dist loadfile "$@"
    ;;
  *)
    setup
    exec "$venv/bin/python" -m megatron_sse.launch "$@"
    ;;
esac
