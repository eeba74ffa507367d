#!/usr/bin/env bash
# Train on several machines in the image. On every machine, with its own NODE_RANK (0, 1, ...):
#
#   NODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 launch/docker/many_nodes.sh IMAGE CONFIG [key=value ...]
#
# MASTER_ADDR is the machine with NODE_RANK=0; MASTER_PORT (29500) must be open there. NPROC:
# processes a machine, where there are no GPUs. The current folder is /work in the container and
# must be the same everywhere (a shared file system). Credentials of object stores and some settings
# of this shell are passed on by name; environment.sh lists them. torchrun exits with 1 whatever went
# wrong.
set -euo pipefail

if [[ $# -lt 2 ]]; then
  echo "usage: NODES=N NODE_RANK=I MASTER_ADDR=HOST launch/docker/many_nodes.sh IMAGE CONFIG" \
    "[key=value ...]" >&2
  exit 2
fi
: "${NODES:?how many machines}" "${NODE_RANK:?which of them this is, from 0}"
: "${MASTER_ADDR:?the address of machine 0}"
image="$1"
shift
devices=()
processes="${NPROC:-1}"
if command -v nvidia-smi >/dev/null; then
  devices=(--gpus all)
  processes="${NPROC:-$(nvidia-smi --list-gpus | wc -l)}"
fi
# shellcheck source=launch/docker/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
exec docker run --rm --init --stop-timeout 300 "${devices[@]}" --ipc host --network host \
  --ulimit memlock=-1 --ulimit stack=67108864 --user "$(id -u):$(id -g)" --env HOME=/tmp \
  "${environment[@]}" --volume "$PWD:/work" --entrypoint torchrun "$image" --nnodes "$NODES" \
  --node-rank "$NODE_RANK" --master-addr "$MASTER_ADDR" --master-port "${MASTER_PORT:-29500}" \
  --nproc-per-node "$processes" --shutdown-timeout 300 \
  --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 -m llmtrain train "$@"
