#!/usr/bin/env bash
# Build the image: launch/docker/build.sh cpu|cuda TAG [option of docker build ...]
#
# The digests of the bases come from the environment (CPU_DIGEST, or CUDA_BUILD_DIGEST and
# CUDA_DIGEST: sha256:...). One that is not set is looked up by its tag and printed: keep it, and the
# same image can be built again. DOCKER: another program that builds like docker (podman, buildah).
set -euo pipefail

target="${1:-}"
if [[ $# -lt 2 || ! $target =~ ^(cpu|cuda)$ ]]; then
  echo "usage: launch/docker/build.sh cpu|cuda TAG [option of docker build ...]" >&2
  exit 2
fi
docker="${DOCKER:-docker}"
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
names=(CPU)
if [[ $target == cuda ]]; then names=(CUDA_BUILD CUDA); fi

arguments=()
for name in "${names[@]}"; do
  digest_name="${name}_DIGEST"
  digest="${!digest_name:-}"
  if [[ -z $digest && $docker != docker ]]; then
    echo "only docker looks up digests here: export ${name}_DIGEST=sha256:..." >&2
    exit 2
  fi
  if [[ -z $digest ]]; then
    base="$(sed -n "s/^ARG ${name}_BASE=//p" "$root/Dockerfile")"
    digest="$(docker buildx imagetools inspect --format '{{.Manifest.Digest}}' "$base")"
    echo "$base is today: export $digest_name=$digest"
  fi
  arguments+=(--build-arg "$digest_name=$digest")
done
exec "$docker" build --target "$target" --tag "$2" "${arguments[@]}" "${@:3}" "$root"
