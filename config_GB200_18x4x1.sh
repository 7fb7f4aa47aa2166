#!/usr/bin/env bash
#   source config_GB200_18x4x1.sh && sbatch -N "$DGXNNODES" -t "$WALLTIME" run.sub
# One GB200 NVL72 rack (72 x 192 GB): CP8, DP9, GBS 9, FP8. Published runs of this shape take 1.4 to 1.7 minutes.
export DGXSYSTEM=GB200_18x4x1
source "$(dirname "${BASH_SOURCE[0]}")/config_common_blackwell.sh"

export ACCELERATOR=GB200
export WALLTIME=01:30:00
export CP=8 # GBS is small, so eight GPUs share each sequence over NVLink
export LR=5e-4
export MAX_STEPS=800          # end of the cosine; the mean run stops after 365 steps
export SBATCH_SEGMENT_SIZE=18 # whole context-parallel groups in a rack; Slurm before 25.05.1: --segment
