#!/usr/bin/env bash
# The rehearsal's config on two nodes of two ranks, for the tests' tiny model and data.
# shellcheck source=/dev/null
source "$(dirname "${BASH_SOURCE[0]}")/../../config_CPU_1x2x4.sh"
export DGXSYSTEM=CPU_2x2x4
export DGXNNODES=2
# Fixed here, so that the rehearsal may change
export MINIBS=4
export MBS=4
export LR=5e-4
export MAX_SEQLEN=32
export MAX_STEPS=4
export EVAL_EVERY_SEQUENCES=16
export EVAL_SKIP=0
