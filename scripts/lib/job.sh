#!/usr/bin/env bash
# What a job is: defaults, checks of what the user set, absolute paths, its files. run.sub sources this. Only functions.
# shellcheck disable=SC2034,SC2154  # run.sub declares and reads the variables

set_defaults() {
  DRY_RUN="${DRY_RUN:-0}" LAUNCHER="${LAUNCHER:-slurm}" RULESET="${RULESET-5.1.0}" HEALTH="${HEALTH:-fail}"
  DROP_CACHES="${DROP_CACHES:-require}" STOP_ON_FAILURE="${STOP_ON_FAILURE:-0}" REHEARSE="${REHEARSE:-0}"
  export PYTHON="${PYTHON:-python}" BIND="${BIND:-gpu}" # here, or an image's would hold
  export PLATFORM="${PLATFORM:-gpu}"
  export SLURM_MPI_TYPE="${SLURM_MPI_TYPE:-none}" # PyTorch needs no MPI; a site may prefer pmix
  NCCL_TEST="${NCCL_TEST:-$([[ "${PLATFORM}" == gpu ]] && echo 1 || echo 0)}"
  DOCKER="${DOCKER:-$(command -v docker || command -v podman || echo docker)}"
  DOCKER_ULIMITS="${DOCKER_ULIMITS-memlock=-1 stack=67108864}"
  VBOOST="${VBOOST:-}" GPU_CLOCKS="${GPU_CLOCKS:-}"
  job="${SLURM_JOB_ID:-$$}" restart="${SLURM_RESTART_COUNT:-0}"
  # What a shell happens to carry would contradict what the launcher sets for each rank
  unset RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE
  hide_image_settings
  exec 3>&1 # where a dry run prints commands, whatever their output is redirected to
}

check_variables() {
  local problems
  mapfile -t problems < <(
    unset_variables
    bad_paths
    bad_choice LAUNCHER slurm local
    bad_choice HEALTH off warn fail
    bad_choice DROP_CACHES off try require
    bad_choice BIND gpu none
    local name
    for name in DRY_RUN NCCL_TEST REHEARSE STOP_ON_FAILURE; do bad_choice "${name}" 0 1; done
    bad_form NEXP '[1-9][0-9]*' "a whole number, at least 1"
    bad_form VBOOST '[0-9]+' "a whole number: the slider's place in nvidia-smi boost-slider --list"
    bad_form GPU_CLOCKS '[0-9]+(,[0-9]+)?' "MHz or MIN,MAX in MHz, as nvidia-smi --lock-gpu-clocks takes them"
    bad_number_of_nodes
  )
  ((${#problems[@]} == 0)) || die 2 "${problems[@]}"
}

unset_variables() {
  not_set "export them before sbatch, without --export=NONE" CONT DATADIR MODEL LOGDIR
  not_set "source a config_*.sh" DGXSYSTEM DGXNNODES DGXNGPU NEXP
}

not_set() { # cure names...
  local name names=()
  for name in "${@:2}"; do [[ -n "${!name:-}" ]] || names+=("${name}"); done
  ((${#names[@]} == 0)) || echo "${names[*]}: not set: $1"
}

bad_paths() {
  local name path
  for name in DATADIR MODEL LOGDIR TREE; do
    [[ -n "${!name:-}" ]] || continue
    path="$(absolute "${!name}")"
    [[ "${CONT:-}" == none || "${path}" != *[:,]* ]] ||
      echo "${name}=${path}: a colon or comma in a path cannot be mounted; rename it or use a symbolic link"
    [[ "${name}" == LOGDIR || -d "${path}" || "${DRY_RUN}" == 1 ]] || echo "${name}=${path}: is not a folder on $(hostname)"
  done
}

bad_choice() { # name choices...
  [[ " ${*:2} " == *" ${!1} "* ]] || echo "$1=${!1}: must be one of ${*:2}"
}

bad_form() { # name pattern rule; an unset one is another check's
  [[ -z "${!1:-}" || "${!1}" =~ ^$2$ ]] || echo "$1=${!1}: must be $3"
}

bad_number_of_nodes() {
  if [[ "${LAUNCHER}" == local ]]; then
    [[ "${DGXNNODES:-1}" == 1 ]] ||
      echo "DGXNNODES=${DGXNNODES}: must be 1 without Slurm; docs/launch.md has the torchrun lines for several nodes"
    return
  fi
  [[ "${DRY_RUN}" == 1 || -n "${SLURM_JOB_ID:-}" ]] ||
    echo "this is no Slurm job: submit it with sbatch, or use scripts/run_docker.sh"
  [[ "${SLURM_JOB_NUM_NODES:-${DGXNNODES:-}}" == "${DGXNNODES:-}" ]] ||
    echo "DGXNNODES=${DGXNNODES:-}: the job has ${SLURM_JOB_NUM_NODES} nodes; submit with sbatch -N \"\$DGXNNODES\""
}

# Mounts want absolute paths, and we change folder below
absolute() { # path
  case "$1" in
    /*) realpath -m -- "$1" ;;
    *) realpath -m -- "${CALLER}/$1" ;;
  esac
}

set_paths() {
  DATADIR="$(absolute "${DATADIR}")" MODEL="$(absolute "${MODEL}")" LOGDIR="$(absolute "${LOGDIR}")"
  # An image is a file here, or a name in a registry
  [[ ! -f "${CALLER}/${CONT}" && "${CONT}" != ./* && "${CONT}" != ../* ]] || CONT="$(absolute "${CONT}")"
  if [[ "${CONT}" == none ]]; then
    export DATA_PATH="${DATADIR}" CKPT_PATH="${MODEL}" RESULTS_PATH="${LOGDIR}"
    WORKDIR="${TREE}"
  else
    export DATA_PATH=/data CKPT_PATH=/ckpt RESULTS_PATH=/results
    WORKDIR=/workspace/ft-llm
  fi
  # shellcheck source=config_mounts.sh
  source "${TREE}/config_mounts.sh"
  hosts=("$(hostname)")
  if [[ "${LAUNCHER}" == slurm && -n "${SLURM_JOB_NODELIST:-}" ]]; then
    mapfile -t hosts < <(scontrol show hostnames "${SLURM_JOB_NODELIST}")
    export MASTER_ADDR="${MASTER_ADDR:-${hosts[0]}}"
  elif [[ "${LAUNCHER}" == slurm ]]; then
    hosts=(NODE) # of a dry run: Slurm will choose them
  fi
  cd "${TREE}" || exit
}

# All files of a job begin with DATESTAMP. A requeued job takes the one it had, so that it finds its finished trials.
set_files() {
  DATESTAMP="${DATESTAMP:-$(date +%y%m%d%H%M%S)_${job}}"
  [[ "${DRY_RUN}" != 1 ]] || return 0
  mkdir -p "${LOGDIR}" || die 2 "LOGDIR=${LOGDIR}: cannot be made"
  local memory="${LOGDIR}/.datestamp_${job}"
  [[ "${restart}" == 0 || ! -f "${memory}" ]] || DATESTAMP="$(<"${memory}")"
  printf '%s\n' "${DATESTAMP}" 2>/dev/null >"${memory}" ||
    die 2 "LOGDIR=${LOGDIR}: $(id -un) cannot write there on $(hostname): no permission, or no space"
  [[ "${LAUNCHER}" == slurm ]] || rm "${memory}" # only Slurm requeues
}
