#!/usr/bin/env bash
#   source config_GB300_128x4x1.sh && sbatch -N "$DGXNNODES" -t "$WALLTIME" run.sub
# 128 GB300 trays (512 x 288 GB): CP8, DP64, GBS 64, FP8. Published runs of this shape: 0.4 minutes.
export DGXSYSTEM=GB300_128x4x1
source "$(dirname "${BASH_SOURCE[0]}")/config_common_blackwell.sh"

export ACCELERATOR=GB300
export WALLTIME=01:00:00
export CP=8 # two trays share each sequence over NVLink
export LR=6e-4
export MAX_STEPS=600          # end of the cosine; the mean run stops after 111 steps
export SBATCH_SEGMENT_SIZE=16 # whole context-parallel groups in a rack; Slurm before 25.05.1: --segment
