#!/usr/bin/env bash
# The rehearsal: two CPU ranks, a small Llama, GBS 8. Started by scripts/rehearse.sh; only this file differs from a cluster run.
source "$(dirname "${BASH_SOURCE[0]}")/config_common.sh"

# System
export PLATFORM=cpu
export DGXSYSTEM=CPU_1x2x4
export DGXNNODES=1
export DGXNGPU=2 # ranks
export ACCELERATOR=CPU
export WALLTIME=15
export NEXP=1

# Parallelism: two data-parallel replicas; TP=2, PP=2 or CP=2 give the same numbers
export TP=1
export PP=1
export CP=1
export SP=0

# Hyperparameters that the rules leave free
export MINIBS=4
export MBS=4
export VAL_MBS=16
export LR="${LR:-3.5e-4}" # these two may be set before: one's own text asks for others
export MAX_STEPS="${MAX_STEPS:-480}"

# A small model on short sequences: what the closed division fixes at 8,192
export MAX_SEQLEN=256

export WARMUP_TRAIN_STEPS=2
export WARMUP_VALIDATION_STEPS=1
export SAVE_ADAPTER=1
