#!/usr/bin/env bash
#   source config_DGXB200_1x8x1.sh && sbatch -N "$DGXNNODES" -t "$WALLTIME" run.sub
# One DGX B200 (8 x 180 GB): DP8, GBS 8, FP8. Published runs of this shape: v5.0.
export DGXSYSTEM=DGXB200_1x8x1
source "$(dirname "${BASH_SOURCE[0]}")/config_common_blackwell.sh"

export ACCELERATOR=B200
export WALLTIME=04:00:00
export CP=1
export LR=5.5e-4
export MAX_STEPS=800 # end of the cosine; the mean run stops after 397 steps
export FP8_ACT=1     # SwiGLU's input is the largest activation
