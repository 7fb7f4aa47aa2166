#!/usr/bin/env bash
# One rank of one training run: the launcher's variables -> RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR,
# MASTER_PORT -> exec python src/train.py (or the program given). Works under srun, torchrun (--no-python), mpirun, or alone (one
# rank).
#   srun -N 2 --ntasks-per-node=8 scripts/run_and_time.sh
#   scripts/torchrun.py --nproc-per-node=8 --no-python scripts/run_and_time.sh
# DRY_RUN=1 prints instead of running. BIND=none leaves CPU affinity alone. PYTHON names another interpreter.
set -euo pipefail

die() {
  printf 'run_and_time.sh: error: %s\n' "$*" >&2
  exit 2
}

# torchrun and mpirun may themselves run below Slurm, whose variables then describe the launcher and not this rank: ask
# the innermost first. A bare RANK comes last: shells export it by accident.
map_launcher() {
  if [[ -n "${TORCHELASTIC_RUN_ID:-}" ]]; then
    launcher=torchrun
  elif [[ -n "${OMPI_COMM_WORLD_RANK:-}" ]]; then
    launcher="Open MPI"
    export RANK="${OMPI_COMM_WORLD_RANK}" WORLD_SIZE="${OMPI_COMM_WORLD_SIZE}"
    export LOCAL_RANK="${OMPI_COMM_WORLD_LOCAL_RANK}" LOCAL_WORLD_SIZE="${OMPI_COMM_WORLD_LOCAL_SIZE}"
  elif [[ -n "${SLURM_PROCID:-}" && -n "${SLURM_STEP_ID:-}" ]]; then
    launcher=Slurm
    export RANK="${SLURM_PROCID}" WORLD_SIZE="${SLURM_NTASKS:?}" LOCAL_RANK="${SLURM_LOCALID:?}"
    # 8(x2) or, where nodes differ, 8,4: tasks of every node, in node order
    [[ "${SLURM_STEP_TASKS_PER_NODE:-}" =~ ^([0-9]+)(\(x[0-9]+\))?$ ]] ||
      die "SLURM_STEP_TASKS_PER_NODE=${SLURM_STEP_TASKS_PER_NODE:-}: every node must run as many tasks; use srun --ntasks-per-node"
    export LOCAL_WORLD_SIZE="${BASH_REMATCH[1]}"
  elif [[ -n "${RANK:-}" ]]; then
    launcher=environment
    [[ -n "${WORLD_SIZE:-}" && -n "${LOCAL_RANK:-}" ]] ||
      die "RANK=${RANK} without WORLD_SIZE and LOCAL_RANK: set all three, or launch with srun, torchrun or mpirun"
    export LOCAL_WORLD_SIZE="${LOCAL_WORLD_SIZE:-${WORLD_SIZE}}"
  else
    launcher=none
    export RANK=0 LOCAL_RANK=0 WORLD_SIZE=1 LOCAL_WORLD_SIZE=1
  fi
}

map_rendezvous() {
  if [[ -z "${MASTER_ADDR:-}" ]]; then
    [[ "${WORLD_SIZE}" == "${LOCAL_WORLD_SIZE}" ]] ||
      die "MASTER_ADDR is not set: with more than one node it must name the host of rank 0 (run.sub and torchrun set it)"
    export MASTER_ADDR=127.0.0.1
  fi
  export MASTER_PORT="${MASTER_PORT:-29500}"
}

# Keep a rank on the cores beside its GPU: feeding it from the other socket costs step time and jitter.
binding() {
  bind=()
  [[ "${BIND:-gpu}" == gpu && "${PLATFORM:-gpu}" == gpu ]] && command -v nvidia-smi taskset >/dev/null || return 0
  local bus cpus
  bus="$(nvidia-smi --id="${LOCAL_RANK}" --query-gpu=pci.bus_id --format=csv,noheader 2>/dev/null)" || return 0
  bus="${bus,,}" # 00000000:1B:00.0 -> 0000:1b:00.0, as in sysfs
  cpus="$(cat "/sys/bus/pci/devices/${bus: -12}/local_cpulist" 2>/dev/null)" || return 0
  # A site's own limits (cgroups) win: never ask for cores that this process may not use
  [[ -n "${cpus}" ]] && taskset -c "${cpus}" true 2>/dev/null && bind=(taskset -c "${cpus}") || return 0
}

# OBSERVE_NSYS: this rank below Nsight Systems, which records only between the marks that training/observe.py sets
nsight() {
  nsys=()
  [[ -n "${OBSERVE_NSYS:-}" && ",${OBSERVE_RANKS:-0}," == *",${RANK},"* ]] || return 0
  command -v nsys >/dev/null || die "OBSERVE_NSYS=${OBSERVE_NSYS}: nsys is not in this image; OBSERVE_PROFILE needs none"
  nsys=(nsys profile "--trace=cuda,nvtx" --capture-range=cudaProfilerApi --capture-range-end=stop --force-overwrite=true
    --output="${RESULTS_PATH:-/results}/nsys_${TRIAL_NAME:-run}_${RANK}")
}

main() {
  local launcher bind nsys command
  if [[ "${1:-}" == --help || "${1:-}" == -h ]]; then
    sed -n '2,/^set /s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    return
  fi
  [[ "${DRY_RUN:-0}" == [01] ]] || die "DRY_RUN=${DRY_RUN}: must be 0 or 1"
  cd "$(dirname "${BASH_SOURCE[0]}")/.."
  map_launcher
  map_rendezvous
  binding
  (($# > 0)) || nsight
  command=("${bind[@]}" "${nsys[@]}" "${PYTHON:-python}" -u "${@:-src/train.py}")
  if [[ "${DRY_RUN:-0}" == 1 ]]; then
    local name
    for name in RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT; do
      printf '%s=%q ' "${name}" "${!name}"
    done
    printf '%q ' "${command[@]}"
    printf '# launcher: %s\n' "${launcher}"
    return 0
  fi
  unset TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD # with it, loading a checkpoint runs code that stands in its files
  exec "${command[@]}"
}

main "$@"
