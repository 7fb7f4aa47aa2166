#!/usr/bin/env bash
# Sourced by every config_*.sh: names of the submitter, and variables that libraries read, a reason each. Only exports.

# Who submits: set these before sourcing a config. The defaults say that the run is no submission.
export MLPERF_SUBMITTER="${MLPERF_SUBMITTER:-unofficial}"
export MLPERF_STATUS="${MLPERF_STATUS:-research}"
export MLPERF_DIVISION="${MLPERF_DIVISION:-closed}"
export NEXP="${NEXP:-10}"

# One process per GPU: torch would otherwise start a thread per core in each of them.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# Training reads mounted folders only; a look-up on the hub would cost init time and fail on nodes without a network.
export HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}"
# Hundreds of ranks writing .pyc files into one image or file system.
export PYTHONDONTWRITEBYTECODE=1
# One hardware queue, so that a collective that was launched before a GEMM also starts before it: Megatron's overlap of
# tensor and context parallelism depends on that order (Hopper; a Blackwell config sets 32).
export CUDA_DEVICE_MAX_CONNECTIONS=1
# Segments that grow: 80 GB parts run within a few GB of the limit, and fixed segments fragment.
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
# NVLink SHARP buffers take up to 2 GB per GPU; the TP traffic goes through userbuffers, DP traffic is 90 MB a step.
export NCCL_NVLS_ENABLE=0
# A node that is lost ends the run after this many seconds, not after PyTorch's 10 to 30 minutes. NeMo takes it as
# the time limit of every collective too, so it must exceed the loading of the checkpoint.
export TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC=600
