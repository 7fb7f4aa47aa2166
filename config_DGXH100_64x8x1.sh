#!/usr/bin/env bash
#   source config_DGXH100_64x8x1.sh && sbatch -N "$DGXNNODES" -t "$WALLTIME" run.sub
# 64 DGX H100 (512 x 80 GB): TP4 CP2, DP64, GBS 64. The layout of the published 8 and 128 nodes.
export DGXSYSTEM=DGXH100_64x8x1
source "$(dirname "${BASH_SOURCE[0]}")/config_common_hopper.sh"

export ACCELERATOR=H100
export WALLTIME=01:30:00
export TP=4 CP=2
export LR=6e-4        # that of the published runs at GBS 64 and 128
export MAX_STEPS=1024 # end of the cosine
