#!/usr/bin/env bash
# Train on this machine in the image, on all its GPUs or NPROC processes on CPUs:
#
#   launch/docker/one_node.sh IMAGE configs/quickstart.yaml train.duration=100step
#
# The current folder is /work in the container: data and runs stay here, and belong to you. `docker
# stop` saves: five minutes pass before the container is killed. Credentials of object stores and
# some settings of this shell are passed on by name; environment.sh lists them.
set -euo pipefail

if [[ $# -lt 2 ]]; then
  echo "usage: [NPROC=N] launch/docker/one_node.sh IMAGE CONFIG [key=value ...]" >&2
  exit 2
fi
image="$1"
shift
devices=()
if command -v nvidia-smi >/dev/null; then devices=(--gpus all); fi
# shellcheck source=launch/docker/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
exec docker run --rm --init --stop-timeout 300 "${devices[@]}" --ipc host --network host \
  --ulimit memlock=-1 --ulimit stack=67108864 --user "$(id -u):$(id -g)" --env HOME=/tmp \
  --env NPROC "${environment[@]}" --volume "$PWD:/work" \
  --entrypoint /opt/llmtrain/launch/local.sh "$image" "$@"
