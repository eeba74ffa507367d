#!/usr/bin/env bash
# Everything of llmtrain that needs a GPU, the most valuable first, within a budget of time: build,
# tests, benchmarks, sanitizer. A part that fails or runs out of time does not stop the others.
#
#   bash benchmarks/gpu_all.sh
#
# PYTHON   the interpreter that has torch for CUDA (default: python3)
# OUT      where results (JSON), gpu_all.log and summary.txt go (default: benchmarks/results/gpu)
# BUDGET   seconds for everything (default: 780)
# WHEELS   a folder of wheels to install first, for machines that reach no package index
set -u
cd "$(dirname "$0")/.." || exit
PYTHON=${PYTHON:-python3}
OUT=${OUT:-benchmarks/results/gpu}
BUDGET=${BUDGET:-780}
export PYTHONPATH="$PWD:$PWD/tests:$PWD/benchmarks" PYTHONUNBUFFERED=1
"$PYTHON" -c 'import torch; raise SystemExit(not torch.cuda.is_available())' || {
  echo "gpu_all.sh: torch of $PYTHON finds no CUDA device, and all of this needs one;" \
    "llmtrain doctor says what is missing" >&2
  exit 2
}
mkdir -p "$OUT"
LOG="$OUT/gpu_all.log" SUMMARY="$OUT/summary.txt"
: >"$LOG"
: >"$SUMMARY"

# part NAME SECONDS COMMAND...: at most that long, and no longer than the budget lasts.
part() {
  local name=$1 limit=$2 begin=$SECONDS left=$((BUDGET - SECONDS)) code
  shift 2
  if [ "$left" -lt 15 ]; then
    echo "$name: skipped, the budget is spent" | tee -a "$SUMMARY"
    return
  fi
  [ "$limit" -le "$left" ] || limit=$left
  printf '\n== %s\n' "$name" >>"$LOG"
  timeout --signal=INT --kill-after=5 "$limit" "$@" >"$OUT/.part" 2>&1
  code=$?
  cat "$OUT/.part" >>"$LOG"
  printf '\n== %s\n' "$name"
  tail -n 25 "$OUT/.part"
  case $code in
    0) echo "$name: done in $((SECONDS - begin)) s" ;;
    124 | 137) echo "$name: stopped after $limit s" ;;
    *) echo "$name: failed with exit code $code after $((SECONDS - begin)) s" ;;
  esac | tee -a "$SUMMARY"
  rm -f "$OUT/.part"
}

# Only what the library lacks, for this machine's architecture alone.
build() {
  if [ -n "${WHEELS:-}" ]; then
    "$PYTHON" -m pip install --no-index --no-deps "$WHEELS"/*.whl || return
  fi
  "$PYTHON" -c 'from llmtrain import ops; raise SystemExit(not ops.native_loaded())' ||
    "$PYTHON" -m llmtrain.ops.build &
  "$PYTHON" -c 'from llmtrain import ops; raise SystemExit(bool(ops.cuda_fault()))' || {
    LLMTRAIN_CUDA_ARCHITECTURES=$("$PYTHON" -c '
import torch
known = {(8, 0): "80", (8, 9): "89", (9, 0): "90a", (10, 0): "100"}
print(known.get(torch.cuda.get_device_capability(), ""))') \
      "$PYTHON" -m llmtrain.ops.build_cuda
  }
  wait
  "$PYTHON" -m llmtrain doctor
}
export -f build
export PYTHON

part build 300 bash -c build
part "FP8 tests" 120 "$PYTHON" -m pytest tests/gpu/test_fp8_cuda.py -q --tb=short
part "FP8 kernels" 60 "$PYTHON" benchmarks/fp8_gpu.py --parts kernels sums --out "$OUT/fp8_gpu.json"
part "FP8 steps, 1B" 120 "$PYTHON" benchmarks/fp8_steps_gpu.py --models 1B \
  --out "$OUT/fp8_steps_gpu_1B.json"
part "FP8 layers" 100 "$PYTHON" benchmarks/fp8_gpu.py --parts layers --out "$OUT/fp8_layers_gpu.json"
part "FP8 steps, 7B" 120 "$PYTHON" benchmarks/fp8_steps_gpu.py --models 7B \
  --out "$OUT/fp8_steps_gpu_7B.json"
if [ -f benchmarks/sparse_gpu.py ]; then
  part "sparse" 90 "$PYTHON" benchmarks/sparse_gpu.py --out "$OUT/sparse_gpu.json"
fi
part "other tests" 150 "$PYTHON" -m pytest -m gpu tests/gpu --ignore tests/gpu/test_fp8_cuda.py \
  -q --tb=short
part "one GPU" 120 "$PYTHON" benchmarks/gpu_single.py --rounds 1 --steps 8 --out "$OUT/gpu_single.json"
if command -v compute-sanitizer >/dev/null; then
  part "sanitizer" 200 bash benchmarks/sanitize_gpu.sh
fi

printf '\n== summary, %s s\n' "$SECONDS"
cat "$SUMMARY"
