#!/usr/bin/env bash
# The first pass on one GPU, in at most nine minutes and without a network, from a machine that has only torch and Triton.
#   tools/gpu_pass.sh [FOLDER]
# FOLDER (default: gpu_pass) receives summary.md, a table of what passed, and results.tgz with everything that was said.
# Both are written again after every stage. docs/gpu_pending.md explains the stages. Exit status: 0 if all passed, else 1.
#   GPU_PASS_SECONDS   seconds for all stages together (default 540)
#   PYTHON             the Python that has torch (default python3)
# Packages that the machine lacks are taken from .whl/, which tools/gpu_wheels.py fills beforehand.
set -uo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
case "${1:-}" in
  -h | --help)
    sed -n '2,9s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    exit 0
    ;;
esac
results=${1:-gpu_pass}
mkdir -p "$results/logs" || exit 2
results=$(cd "$results" && pwd)
cd "$root" || exit 2
python=${PYTHON:-python3}
end=$((SECONDS + ${GPU_PASS_SECONDS:-540}))
failed=0
rows=()

export PYTHONUNBUFFERED=1 TRITON_INTERPRET=0
# The hand-off folds matrices in fp32, for which TF32 is too coarse.
unset TORCH_ALLOW_TF32_CUBLAS_OVERRIDE
export PYTHONPATH="$root:$results/packages${PYTHONPATH:+:$PYTHONPATH}"

write_results() {
  {
    echo "| stage | result | seconds | limit |"
    echo "|---|---|---|---|"
    printf '%s\n' "${rows[@]}"
  } >"$results/summary.md"
  # Renamed when complete, since the machine may be taken away at any time.
  tar -C "$results" -czf "$results/unfinished.tgz" --exclude=checkpoints --exclude='*.pickle' \
    summary.md logs $(cd "$results" && ls -d run speed_*.md 2>/dev/null) && mv "$results/unfinished.tgz" "$results/results.tgz"
}

# stage NAME LIMIT COMMAND...: runs a command for at most LIMIT seconds, or what is left of all; later stages run anyway.
stage() {
  local name=$1 limit=$2 left=$((end - SECONDS)) begin=$SECONDS status result
  shift 2
  if [ "$left" -lt 1 ]; then
    rows+=("| $name | not reached | | $limit |")
    failed=1
    write_results
    return 1
  fi
  [ "$limit" -le "$left" ] || limit=$left
  echo "== $name (at most $limit s)"
  timeout --kill-after=5 "$limit" "$@" >"$results/logs/$name.log" 2>&1
  status=$?
  case $status in
    0) result=pass ;;
    124 | 137) result="FAIL: over its limit" ;;
    *) result="FAIL: exit status $status" ;;
  esac
  [ "$status" = 0 ] || failed=1
  tail -n 12 "$results/logs/$name.log" | cut -c1-200
  rows+=("| $name | $result | $((SECONDS - begin)) | $limit |")
  write_results
  return "$status"
}

pytest() { # NAME LIMIT ARGUMENTS...
  local name=$1 limit=$2
  shift 2
  stage "$name" "$limit" "$python" -m pytest -q -p no:cacheprovider -p no:xdist --tb=short "$@"
}

train() { # NAME LIMIT STEPS ARGUMENTS...
  local name=$1 limit=$2 steps=$3 task='{mqar: {pairs: 64, keys: 64, values: 32}}'
  shift 3
  stage "$name" "$limit" "$python" -m megatron_sse train configs/sse_h_600m.yaml "data.train=$task" \
    "data.validation=$task" training.validation_interval=1000 training.global_batch_size=4 monitor.log_interval=1 \
    "monitor.folder=$results/run" "training.steps=$steps" "$@"
}

attention=tests/kernels/triton/gpu_attention.py
other=tests/kernels/triton/gpu_other.py

stage packages 60 "$python" tools/gpu_wheels.py --install "$results/packages"
stage machine 60 "$python" tools/gpu_machine.py
# The small ones first: when they fail, nothing else matters.
pytest small 100 $attention -k small
pytest other_kernels 60 $other
pytest bits_syncs_graph 100 $attention -k "bits or wait or graph"
pytest bf16 90 $attention -k "bf16 and (128 or 64-64)"
train train 120 12 'monitor.profile_steps=[10, 11]' checkpoint.interval=11
stage profile 20 "$python" -m megatron_sse.tools.profile_summary "$results/run"
# The optimizer's state goes through the disk and back.
train resume 60 14
pytest graph 60 tests/inference/gpu_captured.py
echo "1 2 3 4 5 6 7 8" >"$results/tokens.txt"
decode() { # NAME OPTION...
  local name=$1
  shift
  stage "$name" 40 "$python" -m megatron_sse generate "$results/run" --tokens "$results/tokens.txt" "$@"
}
decode decode
decode decode_graph --cuda-graph
for recurrence in gla gdn; do
  stage speed_$recurrence 90 "$python" -m megatron_sse.tools.bench_kernels --roofline --recurrences $recurrence \
    --shapes 16x128 --banks 4x1 --tokens 8192,131072 --output "$results/speed_$recurrence.md"
done
stage host_time 30 "$python" -m megatron_sse.tools.bench_kernels --host-time --shapes 16x128 --banks 4x1 --tokens 256
pytest bf16_wide 60 $attention -k "bf16 and (256 or 192)"
pytest beyond_32_bits 60 $attention -k beyond
export PYTORCH_NO_CUDA_MEMORY_CACHING=1
stage memcheck 100 compute-sanitizer --tool memcheck --print-limit 5 --error-exitcode 1 \
  "$python" -m pytest -q -p no:cacheprovider -p no:xdist $attention -k "small and gla and not mask"

rm -rf "$results/run/checkpoints"
cat "$results/summary.md"
exit $failed
