#!/usr/bin/env bash
# What H100 and H200 share, a reason per line. A config that differs sets its own value after sourcing this.
source "$(dirname "${BASH_SOURCE[0]}")/config_common.sh"

# Layout: MBS 1 everywhere, since one row of 8,192 tokens fills the GPU.
export PP=1 MBS=1

# Precision: FP8 with delayed scaling.
export FP8=1
export FP8_FORMAT=hybrid # E5M2 for gradients: they need range more than digits
export FP8_AMAX_ALGO=max # an outlier is remembered, so nothing is clipped for the length of the history
export FP8_AMAX_HISTORY=32
export FP8_PARAMS=1 # with bf16 weights beside FP8 copies and their transposes, 69 of 80 GB would be weights (TP4)

# Communication.
export SP=1 TP_COMM_OVERLAP=1 # userbuffers hide the tensor-parallel collectives behind the matrix products
# One hardware queue, so that a collective that was launched before a GEMM also starts before it: Megatron's overlap of
# tensor and context parallelism depends on that order.
export CUDA_DEVICE_MAX_CONNECTIONS=1
# NVLink SHARP buffers take up to 2 GB per GPU; the TP traffic goes through userbuffers, DP traffic is 54 MB of gradients a step (TP4).
export NCCL_NVLS_ENABLE=0

# Synthetic steps before the clock: kernels, cuBLAS heuristics and communicators exist when it starts.
export WARMUP_TRAIN_STEPS=5 WARMUP_VALIDATION_STEPS=5
