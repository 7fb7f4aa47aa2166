#!/usr/bin/env bash
#   source config_DGXH100_8x8x1.sh && sbatch -N "$DGXNNODES" -t "$WALLTIME" run.sub
# Eight DGX H100 (64 x 80 GB): TP4 CP2, DP8, GBS 8. Published runs of this shape: 0.54 to 0.60 s a step, 4.3 to 5.0 minutes.
export DGXSYSTEM=DGXH100_8x8x1
source "$(dirname "${BASH_SOURCE[0]}")/config_common_hopper.sh"

export ACCELERATOR=H100
export WALLTIME=03:00:00
export TP=4 CP=2 # two groups of four 80 GB parts share each sequence
export LR=4e-4
export MAX_STEPS=1024 # end of the cosine; the mean run stops after 397 steps
