#!/usr/bin/env bash
#   scripts/rehearse.sh --gpu
# The rehearsal on 1 GPU of a node: a small Llama, FP8, GBS 8. Real kernels, and the cluster run's files, log and judgement.
export DGXSYSTEM=GPU_1x1x8
source "$(dirname "${BASH_SOURCE[0]}")/config_common_rehearsal.sh"
