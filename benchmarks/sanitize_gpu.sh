#!/usr/bin/env bash
# The FP8 kernels under NVIDIA's compute-sanitizer: memory, races, uninitialised reads, barriers.
# Each tensor gets an allocation of its own (torch's caching allocator would hide what runs over).
#
#   PYTHON=python3 bash benchmarks/sanitize_gpu.sh [memcheck racecheck initcheck synccheck]
set -u
cd "$(dirname "$0")/.." || exit
export PYTHONPATH="$PWD:$PWD/tests" PYTORCH_NO_CUDA_MEMORY_CACHING=1
[ $# -gt 0 ] || set -- memcheck racecheck initcheck synccheck
command -v compute-sanitizer >/dev/null || {
  echo "sanitize_gpu.sh: no compute-sanitizer on the path; it comes with NVIDIA's CUDA toolkit" >&2
  exit 2
}
failed=0
for tool in "$@"; do
  echo "== $tool"
  compute-sanitizer --tool "$tool" --error-exitcode 1 --target-processes all \
    "${PYTHON:-python3}" -m pytest tests/gpu/test_fp8_cuda.py -q -p no:xdist \
    -k "cast_transpose or with_casts or one_pass or within_the_product" || failed=1
done
exit $failed
