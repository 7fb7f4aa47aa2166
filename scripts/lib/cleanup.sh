#!/usr/bin/env bash
# What nodes must not keep after a job: its containers, and the clocks that VBOOST and GPU_CLOCKS ask for. run.sub sources this.
# Only functions.
# shellcheck disable=SC2154  # run.sub declares the variables

# ---- Clocks ----------------------------------------------------------------------------------------------------------

gpu_clocks() { # set|restore arguments...
  launch hosts bash "${TREE}/scripts/lib/gpu_clocks.sh" "$1" "${LOGDIR}/.gpu_clocks_${job}" "${@:2}"
}

# What a node does not allow is said there; it ends nothing
set_gpu_clocks() {
  [[ -n "${VBOOST}${GPU_CLOCKS}" ]] || return 0
  clocks_set=1
  gpu_clocks set "${VBOOST}" "${GPU_CLOCKS}" || complain "VBOOST, GPU_CLOCKS: not set on every node (see above)"
}

# ---- Containers ------------------------------------------------------------------------------------------------------

# All that this job has made, in former lives too. Pyxis does not look at the user's ENROOT_* folders, so enroot must not either.
removal() {
  # shellcheck disable=SC2016  # for the shell on the node
  printf '%s ' 'unset "${!ENROOT_@}"; names="$(enroot list)" || exit;' \
    'for name in ${names}; do [[ "${name}" != "$0"* ]] || enroot remove -f "${name}" || exit; done'
}

remove_from_nodes() { launch hosts bash -c "$(removal)" "pyxis_llama2_lora_${job}_"; }

remove_container() {
  if [[ "${LAUNCHER}" == local ]]; then supervise "${DOCKER}" rm --force "${container}" >/dev/null; else remove_from_nodes; fi
}

# ---- Both ------------------------------------------------------------------------------------------------------------

# For a shell on a node
cleanup_command() {
  local commands=()
  if [[ "${CONT}" != none && "${LAUNCHER}" == local ]]; then
    commands+=("$(quoted "${DOCKER}" rm --force "${container}")")
  elif [[ "${CONT}" != none ]]; then
    commands+=("$(quoted bash -c "$(removal)" "pyxis_llama2_lora_${job}_")")
  fi
  [[ -z "${VBOOST}${GPU_CLOCKS}" ]] ||
    commands+=("$(quoted bash "${TREE}/scripts/lib/gpu_clocks.sh" restore "${LOGDIR}/.gpu_clocks_${job}")")
  (IFS=';' && printf '%s' "${commands[*]}")
}

# A cancelled job may launch nothing more. So small jobs that wait for this one's end are booked to clean up after scancel, a lost
# batch host or a kill; a job that ends by itself cleans up and cancels them. One per node: a dead node delays its own alone.
book_cleanup() {
  local host id command booking_here
  command="$(cleanup_command)"
  [[ "${LAUNCHER}" == slurm && -n "${command}" ]] || return 0
  local booking=(sbatch --parsable --job-name="cleanup_${job}" --dependency="afterany:${job}" --nodes=1 --ntasks=1
    --mem=100 --time=15 --chdir=/ --open-mode=append --wrap "${command}")
  # Where Slurm hands out GPUs, a job that asks for none sees none: its nvidia-smi would put nothing back
  [[ -z "${VBOOST}${GPU_CLOCKS}" || -z "${SLURM_GPUS_ON_NODE:-}" ]] || booking+=(--gpus-per-node="${SLURM_GPUS_ON_NODE}")
  [[ -z "${SLURM_JOB_PARTITION:-}" ]] || booking+=(--partition="${SLURM_JOB_PARTITION}")
  [[ -z "${SLURM_JOB_ACCOUNT:-}" ]] || booking+=(--account="${SLURM_JOB_ACCOUNT}")
  for host in "${hosts[@]}"; do
    booking_here=("${booking[@]}" --output="${LOGDIR}/${DATESTAMP}_cleanup_${host}.txt" --nodelist="${host}")
    if ! id="$(unset SBATCH_SEGMENT_SIZE && supervise "${booking_here[@]}")"; then # a config's segment is of many nodes
      say "no cleanup jobs: after scancel, run on the nodes: ${command}"
      return 0
    fi
    [[ "${DRY_RUN}" != 1 ]] || id=CLEANUP_JOB
    cleanup_jobs+=("${id}")
  done
}

clean_up() {
  [[ "${LAUNCHER}" == local || "${stop_status}" != "${EXIT_CANCELLED}" ]] || return 0 # Slurm refuses new steps; the booked jobs do it
  local status=0
  [[ -z "${clocks_set}" ]] || gpu_clocks restore || status=1
  [[ -z "${container}" ]] || remove_container || status=1
  ((status == 0)) || return "${status}"
  ((${#cleanup_jobs[@]} == 0)) || supervise scancel --quiet "${cleanup_jobs[@]}"
}
