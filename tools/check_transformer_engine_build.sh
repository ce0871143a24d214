#!/usr/bin/env bash
# Checks that Transformer Engine's torch part compiles with the pinned torch: every file, without generating code.
#   tools/check_transformer_engine_build.sh PYTHON [PATTERN]
# PYTHON: of an environment with the CUDA build of the pinned torch, whose wheels brought CUDA's headers. No GPU is
# needed. One is made by
#   python3 -m venv FOLDER && FOLDER/bin/pip install -c constraints.txt torch packaging setuptools wheel "cuda-toolkit[cccl]"
# PATTERN: only files whose path matches, such as attention. JOBS: files at a time (default: one per processor).
# Run it whenever constraints.txt changes torch or Transformer Engine. Exit status: 0 if all compile, 1 if not.
set -euo pipefail
if [ $# -lt 1 ] || [ "$1" = -h ] || [ "$1" = --help ]; then
  sed -n '2,8s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
  exit 2
fi
python=$1 pattern=${2:-.}
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
version=$("$python" - "$root/constraints.txt" <<'END'
import sys
from packaging.requirements import Requirement

for line in open(sys.argv[1]):
    if line.startswith("transformer-engine=="):
        pin = Requirement(line.strip())
        if pin.marker is None or pin.marker.evaluate():
            print(next(iter(pin.specifier)).version)
END
)
packages=$("$python" -c 'import torch, pathlib; print(pathlib.Path(torch.__file__).parents[1])')
nvidia=$packages/nvidia
if [ ! -f "$packages/torch/include/c10/cuda/impl/cuda_cmake_macros.h" ]; then
  echo "$python: got a CPU build of torch, allowed a CUDA build, which has the headers" >&2
  exit 2
fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$python" -m pip download --disable-pip-version-check --quiet --no-deps --no-build-isolation --no-binary :all: \
  --dest "$work" "transformer-engine-torch==$version"
tar -xzf "$work"/transformer_engine_torch-*.tar.gz -C "$work"
source=$(echo "$work"/transformer_engine_torch-*/)

includes=("$source/common_headers" "$source/common_headers/common" "$source/common_headers/common/include" "$source/csrc")
system=("$packages/torch/include" "$packages/torch/include/torch/csrc/api/include"
  "$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')"
  "$nvidia"/cu13/include "$nvidia"/cu13/include/cccl "$nvidia"/cudnn/include "$nvidia"/nccl/include)
flags=(-fsyntax-only -std=c++20 -DTORCH_EXTENSION_NAME=transformer_engine_torch -DTORCH_API_INCLUDE_EXTENSION_H)
for folder in "${includes[@]}"; do flags+=("-I$folder"); done
for folder in "${system[@]}"; do flags+=(-isystem "$folder"); done

check() {
  local file=$1
  shift
  if g++ "$@" "$file" 2>"$file.log"; then
    echo "ok   ${file#*/csrc/}"
  else
    echo "FAIL ${file#*/csrc/}: $(grep -m 1 -E 'error: ' "$file.log")"
    return 1
  fi
}
export -f check
mapfile -t files < <(find "$source/csrc" -name '*.cpp' | grep -E "${pattern}" | sort)
echo "Transformer Engine $version, torch $("$python" -c 'import torch; print(torch.__version__)'): ${#files[@]} files"
printf '%s\0' "${files[@]}" | xargs -0 -P "${JOBS:-$(nproc)}" -I{} bash -c 'check "$@"' check {} "${flags[@]}" || {
  echo "does not compile" >&2
  exit 1
}
echo "all compile"
