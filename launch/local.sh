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

# torchrun exits with 1 whatever went wrong; the first rank leaves its own code in this file.
LLMTRAIN_EXIT_FILE="$(mktemp)"
export LLMTRAIN_EXIT_FILE
export TORCHELASTIC_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1

"$python" -m torch.distributed.run --standalone --nproc-per-node "$processes" \
  -m llmtrain train "$@" &
launcher=$!
trap 'kill -TERM "$launcher" 2>/dev/null' TERM USR1 HUP

status=0
wait "$launcher" || status=$?
while kill -0 "$launcher" 2>/dev/null; do  # a signal ends `wait`, not the run
  status=0
  wait "$launcher" || status=$?
done
code="$(cat "$LLMTRAIN_EXIT_FILE")"
rm -f "$LLMTRAIN_EXIT_FILE"
exit "${code:-$status}"
