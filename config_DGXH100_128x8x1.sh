#!/usr/bin/env bash
#   source config_DGXH100_128x8x1.sh && sbatch -N "$DGXNNODES" -t "$WALLTIME" run.sub
# 128 DGX H100 (1,024 x 80 GB): TP4 CP2, DP128, GBS 128. Published runs of this shape take 1.2 minutes.
export DGXSYSTEM=DGXH100_128x8x1
source "$(dirname "${BASH_SOURCE[0]}")/config_common_hopper.sh"

export ACCELERATOR=H100
export WALLTIME=01:30:00
export TP=4 CP=2
export LR=6e-4
export MAX_STEPS=1024 # end of the cosine; the mean run stops after 88 steps
