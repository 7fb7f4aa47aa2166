#!/usr/bin/env bash
#   source config_DGXH200_1x8x2.sh && sbatch -N "$DGXNNODES" -t "$WALLTIME" run.sub
# One DGX H200 (8 x 141 GB): TP2, DP4, GBS 8. Published runs of this shape: 3.2 to 3.5 s a step, 23 to 26 minutes; 22 to 24 with CP2.
export DGXSYSTEM=DGXH200_1x8x2
source "$(dirname "${BASH_SOURCE[0]}")/config_common_hopper.sh"

export ACCELERATOR=H200
export WALLTIME=07:00:00
export TP=2 CP=1 # CP2 keeps all weights and their FP8 transposes on every GPU: 188 of 151 GB
export LR=5e-4
export MAX_STEPS=896 # end of the cosine; the mean run stops after 397 steps
export FP8_DPA=1     # FP8 attention: its saved activations halve
export FP8_ACT=1     # 19 GB less of SwiGLU's input
