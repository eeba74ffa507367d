# shellcheck shell=bash
# What of this shell's environment goes into a container, for one_node.sh and many_nodes.sh.
#
# `environment` becomes the options of docker: of every variable that is exported and fits a line
# below, its name alone. Docker reads the value itself, so no secret stands in a command line, where
# every user of the machine could read it. LLMTRAIN_PASS holds more names (MY_TOKEN,OTHER_*).

passed=(
  'AWS_*' 'S3_*' GOOGLE_APPLICATION_CREDENTIALS GOOGLE_CLOUD_PROJECT 'GCS_*' 'AZURE_*' 'FSSPEC_*'
  HF_TOKEN HF_ENDPOINT HF_HUB_OFFLINE HF_DATASETS_OFFLINE
  'WANDB_*'
  'LLMTRAIN_*' 'NCCL_*' 'TORCH_NCCL_*' TORCH_DISTRIBUTED_DEBUG 'GLOO_*' 'FI_*' 'UCX_*'
  PYTORCH_CUDA_ALLOC_CONF OMP_NUM_THREADS
  HTTP_PROXY HTTPS_PROXY NO_PROXY http_proxy https_proxy no_proxy
)
# Of a launcher around this one, and folders that are not in the container.
kept_out=(
  LLMTRAIN_PASS LLMTRAIN_EXIT_FILE LLMTRAIN_PROCESS_READY LLMTRAIN_CACHE 'WANDB_*DIR'
)
# They name a file, which has to be in the container under the same path.
files=('AWS_*_FILE' AWS_CA_BUNDLE GOOGLE_APPLICATION_CREDENTIALS 'AZURE_*_FILE' 'AZURE_*_PATH')

# Whether a name ($1) fits one of the patterns after it.
fits() {
  local name="$1" pattern
  shift
  for pattern; do
    # shellcheck disable=SC2053  # the right side is a pattern
    if [[ $name == $pattern ]]; then return 0; fi
  done
  return 1
}

IFS=', ' read -ra more <<< "${LLMTRAIN_PASS:-}"
environment=()
while read -r name; do
  if ! fits "$name" "${passed[@]}" "${more[@]}" || fits "$name" "${kept_out[@]}"; then continue; fi
  environment+=(--env "$name")
  if fits "$name" "${files[@]}" && [[ ${!name} == /* && -f ${!name} ]]; then
    environment+=(--volume "${!name}:${!name}:ro")
  fi
done < <(compgen -e)
