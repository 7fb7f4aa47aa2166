#!/usr/bin/env bash
# One node without Slurm: run.sub's steps with docker or podman, and torchrun in place of srun.
#   export DATADIR=... MODEL=... LOGDIR=... CONT=...         # host paths and image; CONT=none: no container
#   scripts/run_docker.sh config_DGXH100_1x8x4.sh
# DOCKER names the program (default: docker, else podman). DRY_RUN=1 prints every command. Exit status as run.sub's.
set -euo pipefail

main() {
  if [[ "${1:-}" == --help || "${1:-}" == -h ]]; then
    sed -n '2,/^set /s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    return
  fi
  if (($# != 1)) || [[ ! -f "$1" ]]; then
    printf 'usage: %s CONFIG.sh%s\n' "$0" "${1:+ ($1 is no file)}" >&2
    exit 2
  fi
  # shellcheck source=/dev/null
  source "$(realpath "$1")" # without a slash, source would look in PATH first
  LAUNCHER=local exec bash "$(dirname "${BASH_SOURCE[0]}")/../run.sub"
}

main "$@"
