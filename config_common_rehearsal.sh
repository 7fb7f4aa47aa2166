#!/usr/bin/env bash
# What the rehearsals on GPUs share, a reason per line: scripts/rehearse.sh --gpu takes the one for the GPUs that it sees.
source "$(dirname "${BASH_SOURCE[0]}")/config_common.sh"

export PLATFORM=gpu REHEARSAL=1
export WALLTIME=30 NEXP=1
export TP=1 PP=1 CP=1 SP=0 # data-parallel replicas: GBS is 8 on any number of GPUs, and so is the learning rate
export MBS=1 VAL_MBS=4
export LR="${LR:-3.5e-4}" MAX_STEPS="${MAX_STEPS:-480}" # these two may be set before: one's own text asks for others
export MAX_SEQLEN=256

# The precision of the 70B's configs, but for FP8 attention, which cuDNN has for heads of 64 and 128 alone: these have 16.
export FP8=1 FP8_FORMAT=hybrid FP8_AMAX_ALGO=max FP8_AMAX_HISTORY=32
export FP8_PARAMS=1 FP8_ACT=1

export WARMUP_TRAIN_STEPS=5 WARMUP_VALIDATION_STEPS=1
export SAVE_ADAPTER=1
