#!/usr/bin/env bash
#   source config_DGXH100_16x8x1.sh && sbatch -N "$DGXNNODES" -t "$WALLTIME" run.sub
# 16 DGX H100 (128 x 80 GB): TP4 CP2, DP16, GBS 16. Published runs of this shape: 0.59 s a step (v4.1), 0.54 (v6.0).
export DGXSYSTEM=DGXH100_16x8x1
source "$(dirname "${BASH_SOURCE[0]}")/config_common_hopper.sh"

export ACCELERATOR=H100
export WALLTIME=02:30:00
export TP=4 CP=2
export LR=4e-4
export MAX_STEPS=1024 # end of the cosine; at GBS 16 the mean run stops after 4,032 sequences = 252 steps
