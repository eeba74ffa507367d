#!/usr/bin/env bash
# Our CUDA kernels (FP8, masks, 2:4 packing, blocks of 64x64) under NVIDIA's compute-sanitizer:
# memory, races, uninitialised reads, barriers.
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
# check TOOL FILE TESTS: those that call the kernels themselves; whole models take too long here.
check() {
  compute-sanitizer --tool "$1" --error-exitcode 1 --target-processes all \
    "${PYTHON:-python3}" -m pytest "tests/gpu/$2" -q -p no:xdist -k "$3" || failed=1
}
for tool in "$@"; do
  echo "== $tool"
  check "$tool" test_fp8_cuda.py "cast_transpose or with_casts or one_pass or within_the_product"
  check "$tool" test_masking_cuda.py "mask_is_applied or search_finds or adamw_under"
  check "$tool" test_sparse_cuda.py "packing or block_products or no_tokens or blocks-blocks"
done
exit $failed
