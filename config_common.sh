#!/usr/bin/env bash
# What all systems share, a reason per line. A config sets DGXSYSTEM, then sources this or its family's file. Only exports.

# A config that was sourced in this shell before leaves nothing behind: all that it and its family set goes first.
if [[ -n "${CONFIG_FILE:-}" ]]; then
  for name in $(cd "$(dirname "${BASH_SOURCE[0]}")" && cat "${CONFIG_FILE}" config_common_*.sh 2>/dev/null |
    sed -n 's/ #.*//; s/^export //p' | grep -oE '(^| )[A-Z][A-Z0-9_]*=' | tr -d ' ='); do
    [[ "${name}" == DGXSYSTEM ]] || unset "${name}"
  done
  unset name
fi

# Nodes, GPUs per node and MINIBS stand in the system's name: NAME_NODESxGPUSxMINIBS.
IFS=x read -r DGXNNODES DGXNGPU MINIBS <<<"${DGXSYSTEM##*_}"
export DGXNNODES DGXNGPU MINIBS
# The config that was sourced: settings.py refuses one whose name is not DGXSYSTEM's.
CONFIG_FILE="$(printf '%s\n' "${BASH_SOURCE[@]##*/}" | grep '^config_.*\.sh$' | tail -n 1)"
export CONFIG_FILE

# Who submits: set these before sourcing a config. The defaults say that the run is no submission.
export MLPERF_SUBMITTER="${MLPERF_SUBMITTER:-unofficial}"
export MLPERF_STATUS="${MLPERF_STATUS:-research}"
export MLPERF_DIVISION="${MLPERF_DIVISION:-closed}"
export NEXP="${NEXP:-10}" # what a result takes (RUNS_PER_RESULT in config/rules.py)

# One process per GPU: torch would otherwise start a thread per core in each of them.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# Training reads mounted folders only; a look-up on the hub would cost init time and fail on nodes without a network.
export HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}"
# Hundreds of ranks writing .pyc files into one image or file system.
export PYTHONDONTWRITEBYTECODE=1
# Segments that grow: GPUs run within a few GB of their limit, and fixed segments fragment.
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
# A node that is lost ends the run after this many seconds, not after PyTorch's 10 to 30 minutes. NeMo takes it as
# the time limit of every collective too, so it must exceed the loading of the checkpoint.
export TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC=600
