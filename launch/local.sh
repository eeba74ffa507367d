#!/usr/bin/env bash
# Train on this machine with several processes: one per GPU, or NPROC on CPUs.
#
#   launch/local.sh configs/quickstart.yaml train.duration=100step
#   NPROC=4 launch/local.sh configs/quickstart.yaml device=cpu
set -euo pipefail

if [[ $# -lt 1 ]]; then
  echo "usage: [NPROC=N] launch/local.sh CONFIG [key=value ...]" >&2
  exit 2
fi

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="python3"
if [[ -x "$root/.venv/bin/python" ]]; then
  python="$root/.venv/bin/python"
fi

gpus=0
if command -v nvidia-smi >/dev/null; then
  gpus="$(nvidia-smi --list-gpus 2>/dev/null | wc -l)"
fi
processes="${NPROC:-$((gpus > 0 ? gpus : 2))}"

exec "$python" -m torch.distributed.run --standalone --nproc-per-node "$processes" \
  -m llmtrain train "$@"
