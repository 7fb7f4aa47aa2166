#!/usr/bin/env bash
#   source config_DGXH100_1x8x4.sh && sbatch -N "$DGXNNODES" -t "$WALLTIME" run.sub
# One DGX H100 (8 x 80 GB): TP4, DP2, GBS 8. Published runs of this shape: 3.7 s a step, 27 to 28 minutes.
export DGXSYSTEM=DGXH100_1x8x4
source "$(dirname "${BASH_SOURCE[0]}")/config_common_hopper.sh"

export ACCELERATOR=H100
export WALLTIME=08:00:00 # ten trials of 28 minutes, up to 60 where one does not converge, and their initialization
export TP=4 CP=1         # four 80 GB parts hold one replica
export LR=4e-4
export MAX_STEPS=800 # end of the cosine; the mean run stops after 397 steps
export FP8_DPA=1     # FP8 attention: 7% of the FLOP at 8,192 tokens, and its saved activations halve
