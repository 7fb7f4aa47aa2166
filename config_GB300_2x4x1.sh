#!/usr/bin/env bash
#   source config_GB300_2x4x1.sh && sbatch -N "$DGXNNODES" -t "$WALLTIME" run.sub
# Two GB300 trays of one NVL72 rack (8 x 288 GB): DP8, GBS 8, NVFP4. Published runs of this shape: 6.0 minutes.
export DGXSYSTEM=GB300_2x4x1
source "$(dirname "${BASH_SOURCE[0]}")/config_common_blackwell.sh"

export ACCELERATOR=GB300
export WALLTIME=02:00:00
export CP=1
export LR=6e-4
export MAX_STEPS=550                      # end of the cosine; the mean run stops after 397 steps
export FP4=1 FP8=0 FP8_PARAMS=0 FP8_DPA=0 # NVFP4 in place of FP8
export FP4_PARAMS=1                       # no bf16 weights beside them, which would not fit
export FP4_HEAL_STEP=350                  # FP8 from there on, as in published runs
export SBATCH_SEGMENT_SIZE=2              # both trays in one rack; Slurm before 25.05.1: --segment
