# llmtrain in an image: target `cpu`, and target `cuda` with the kernels for sm_80, sm_90a and sm_100
# (llmtrain/ops/build_cuda.py). launch/docker/build.sh builds either; docs/guide/clusters.md says how
# to run it.
#
# The bases are named by digest and have no default: what is built today can be built again.
ARG CPU_BASE=docker.io/library/debian:trixie-slim
ARG CPU_DIGEST
ARG CUDA_BUILD_BASE=docker.io/nvidia/cuda:13.0.1-devel-ubuntu24.04
ARG CUDA_BUILD_DIGEST
ARG CUDA_BASE=docker.io/nvidia/cuda:13.0.1-base-ubuntu24.04
ARG CUDA_DIGEST

FROM ${CPU_BASE}@${CPU_DIGEST} AS cpu-build
ARG TORCH_ARGS="--index-url https://download.pytorch.org/whl/cpu"
RUN apt-get update \
 && apt-get install -y --no-install-recommends g++ python3 python3-dev python3-venv \
 && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/llmtrain
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY llmtrain llmtrain
COPY csrc csrc
# mosaicml-streaming goes in last and without its requirements (docs/install.md).
RUN python3 -m venv /opt/venv \
 && PIP="/opt/venv/bin/pip install --no-cache-dir -c constraints.txt" \
 && $PIP $TORCH_ARGS torch && $PIP -e '.[hf,streaming]' && $PIP --no-deps mosaicml-streaming \
 && /opt/venv/bin/python -m llmtrain.ops.build

FROM ${CUDA_BUILD_BASE}@${CUDA_BUILD_DIGEST} AS cuda-build
ARG TORCH_ARGS=""
RUN apt-get update \
 && apt-get install -y --no-install-recommends g++ python3 python3-dev python3-venv \
 && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/llmtrain
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY llmtrain llmtrain
COPY csrc csrc
RUN python3 -m venv /opt/venv \
 && PIP="/opt/venv/bin/pip install --no-cache-dir -c constraints.txt" \
 && $PIP $TORCH_ARGS torch && $PIP -e '.[hf,streaming]' && $PIP --no-deps mosaicml-streaming \
 && /opt/venv/bin/python -m llmtrain.ops.build \
 && /opt/venv/bin/python -m llmtrain.ops.build_cuda

FROM ${CPU_BASE}@${CPU_DIGEST} AS cpu
RUN apt-get update \
 && apt-get install -y --no-install-recommends python3 \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --uid 10001 --create-home trainer \
 && install -d -o trainer /work
COPY --from=cpu-build /opt /opt
COPY configs /opt/llmtrain/configs
COPY launch /opt/llmtrain/launch
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1
USER 10001
WORKDIR /work
HEALTHCHECK --interval=5m --timeout=2m --start-period=1m CMD ["llmtrain", "doctor"]
ENTRYPOINT ["llmtrain"]
CMD ["--help"]

# torch brings CUDA's libraries and NCCL itself: the base needs none of them.
FROM ${CUDA_BASE}@${CUDA_DIGEST} AS cuda
RUN apt-get update \
 && apt-get install -y --no-install-recommends python3 \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --uid 10001 --create-home trainer \
 && install -d -o trainer /work
COPY --from=cuda-build /opt /opt
COPY configs /opt/llmtrain/configs
COPY launch /opt/llmtrain/launch
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1
USER 10001
WORKDIR /work
HEALTHCHECK --interval=5m --timeout=2m --start-period=1m CMD ["llmtrain", "doctor"]
ENTRYPOINT ["llmtrain"]
CMD ["--help"]
