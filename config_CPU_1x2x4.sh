#!/usr/bin/env bash
#   scripts/rehearse.sh
# The rehearsal: two CPU ranks, a small Llama, GBS 8. Only this file differs from a cluster run.
export DGXSYSTEM=CPU_1x2x4
source "$(dirname "${BASH_SOURCE[0]}")/config_common.sh"

export PLATFORM=cpu ACCELERATOR=CPU
export WALLTIME=15
export NEXP=1
export TP=1 PP=1 CP=1 SP=0 # two data-parallel replicas; TP=2, PP=2 or CP=2 give the same numbers
export MBS=4 VAL_MBS=16
export LR="${LR:-3.5e-4}" # these two may be set before: one's own text asks for others
export MAX_STEPS="${MAX_STEPS:-480}"
export MAX_SEQLEN=256 # short sequences: what the closed division fixes at 8,192
export WARMUP_TRAIN_STEPS=2 WARMUP_VALIDATION_STEPS=1
export SAVE_ADAPTER=1
