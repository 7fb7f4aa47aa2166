# The image for run.sub and run_docker.sh. No data, no secrets; run.sub mounts the tree it was submitted from over the copy here.
#   docker build --build-arg REVISION="$(git rev-parse HEAD)" -t llama2_lora .
#   docker build --build-arg BASE=debian:12 -t llama2_lora:cpu .      rehearsal and preparation scripts, no GPU
# Enroot: enroot import -o llama2_lora.sqsh dockerd://llama2_lora
# The default base is nearest to the pins: torch 2.9, Transformer Engine 2.9, megatron-core 0.15.0 and NeMo 2.6.0, of which the
# last two are brought to the pinned versions.
ARG BASE=nvcr.io/nvidia/nemo:25.11
FROM ${BASE}

WORKDIR /workspace/ft-llm
# Works for any user and on a read-only root: what libraries cache goes to /tmp, what the hub sends to the mounted disk (/data).
# No source tree of the base comes before the pins (PYTHONPATH).
ENV PATH=/opt/llama2_lora/bin:${PATH} \
    HOME=/tmp \
    XDG_CACHE_HOME=/tmp/cache \
    HF_HOME=/data/huggingface \
    MPLCONFIGDIR=/tmp/cache/matplotlib \
    NUMBA_CACHE_DIR=/tmp/cache/numba \
    TORCHINDUCTOR_CACHE_DIR=/tmp/cache/inductor \
    TRITON_CACHE_DIR=/tmp/cache/triton \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONPATH=

# The packages first: a change of the code does not install them anew
COPY requirements.txt requirements-cpu.txt ./
COPY scripts/setup_env.sh scripts/
COPY scripts/lib/install_image.sh scripts/lib/
RUN scripts/lib/install_image.sh packages
COPY . .
RUN scripts/lib/install_image.sh project

ARG REVISION=unknown
LABEL org.opencontainers.image.title="llama2_70b_lora" \
      org.opencontainers.image.revision="${REVISION}"
