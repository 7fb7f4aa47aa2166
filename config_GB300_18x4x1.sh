#!/usr/bin/env bash
#   source config_GB300_18x4x1.sh && sbatch -N "$DGXNNODES" -t "$WALLTIME" run.sub
# One GB300 NVL72 rack (72 x 288 GB): CP8, DP9, GBS 9, FP8. Published runs of this shape take 1.2 minutes.
export DGXSYSTEM=GB300_18x4x1
source "$(dirname "${BASH_SOURCE[0]}")/config_common_blackwell.sh"

export ACCELERATOR=GB300
export WALLTIME=01:30:00
export CP=8 # GBS is small, so eight GPUs share each sequence over NVLink
export LR=5e-4
export MAX_STEPS=800          # end of the cosine; the mean run stops after 365 steps
export SBATCH_SEGMENT_SIZE=18 # whole context-parallel groups in a rack; Slurm before 25.05.1: --segment
