#!/usr/bin/env bash
# Ways to run a command, for run.sub, which sources this: on every node or once per GPU, in the job's container or without one,
# under Slurm with Pyxis, or on this machine (LAUNCHER=local) with docker, podman or no container. Only functions.
# shellcheck disable=SC2154  # run.sub declares the variables

# launch hosts|nodes|first|ranks COMMAND...: once per node outside the container, once per node inside, once inside on the
# first node, once per GPU inside. All but `hosts` run in the tree.
launch() {
  local where="$1" prefix=()
  shift
  "${LAUNCHER}_prefix" "${where}"
  supervise "${prefix[@]}" "$@"
}

slurm_prefix() { # where
  local nodes="${DGXNNODES}" per_node=1 kill=1
  # Steps run one after another: one that Slurm has not quite finished with must not delay the next (--overlap). One task's
  # failure ends the others, which would wait for it (--kill-on-bad-exit); but not what each node does for itself.
  [[ "$1" != hosts ]] || kill=0
  prefix=(srun --export=ALL --overlap --kill-on-bad-exit="${kill}")
  case "$1" in
    first) nodes=1 prefix+=(--relative=0 --cpu-bind=none) ;;          # a rehearsal on all GPUs runs in it: not on one core
    ranks) per_node="${DGXNGPU}" prefix+=(--label --cpu-bind=none) ;; # run_and_time.sh binds
  esac
  prefix+=(--nodes="${nodes}" --ntasks="$((nodes * per_node))" --ntasks-per-node="${per_node}")
  [[ "$1" != hosts ]] || return 0
  if [[ "${CONT}" == none ]]; then
    prefix+=(--chdir="${WORKDIR}")
  else
    prefix+=(--container-name="${container}" --container-mounts="${CONT_MOUNTS}" --container-workdir="${WORKDIR}"
      --no-container-mount-home "$(variable_options)")
  fi
}

local_prefix() { # where
  [[ "$1" != hosts ]] || return 0
  if [[ "${CONT}" != none ]]; then
    local variables
    read -ra variables < <(variable_options)
    prefix=("${DOCKER}" exec --workdir "${WORKDIR}" "${variables[@]}" "${container}")
  fi
  [[ "$1" != ranks ]] ||
    prefix+=("${PYTHON}" -m torch.distributed.run --standalone --nproc-per-node="${DGXNGPU}" --no-python)
}

# All their names, as srun or docker takes them
variable_options() {
  if [[ "${LAUNCHER}" == slurm ]]; then
    printf -- '--container-env=%s\n' "$(task_variables | paste -sd,)"
  else
    task_variables | sed 's/^/--env /' | paste -sd' '
  fi
}

# Names that must reach the training whatever the image sets: all that a config exports, all that settings.py reads, and
# what libraries document. A list and not the whole environment: a host's PATH or CUDA_HOME would break the image.
task_variables() {
  {
    sed -n 's/ #.*//; s/^ *export / /p' "${TREE}"/config_*.sh | grep -oE ' [A-Z][A-Z0-9_]*=' | tr -d ' ='
    settings_variables
    printf '%s\n' LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT BIND PYTHON
    compgen -e | grep -E '^(NCCL|UCX|SHARP|NVTE|TORCH|GLOO|CUBLAS|CUDNN)_' || true
  } | sort -u | grep -vxE 'CONT_MOUNTS|TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD' | grep -Fxf <(compgen -e)
}

settings_variables() {
  sed -n 's/.* = _setting("\([A-Z][A-Z0-9_]*\)".*/\1/p' "${TREE}/src/llama2_lora/config/settings.py"
}

# An image's TARGET_LOSS, or the RANK and WORLD_SIZE of Enroot's hook for PyTorch, must not reach a run: what the job does not
# set is exported empty, which settings.py and run_and_time.sh read as not set.
hide_image_settings() {
  local name
  for name in $(settings_variables) LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT; do
    export "${name}=${!name:-}"
  done
}

# Runs a command in the background: bash looks at signals while it waits for a job, not while a command is in front.
supervise() {
  local status=0
  if [[ "${DRY_RUN}" == 1 ]]; then
    show_command "$@" >&3
    return 0
  fi
  [[ -z "${stop_reason}" ]] || return "${stop_status}"
  "$@" </dev/null &
  child=$!
  while kill -0 "${child}" 2>/dev/null; do
    wait "${child}" && status=0 || status=$?
  done
  child=''
  [[ -z "${stop_reason}" ]] || status="${stop_status}"
  return "${status}"
}

# A command as a shell takes it, and a reader too
quoted() {
  local word words=()
  for word; do
    [[ "${word}" =~ ^[[:alnum:]_./:=,@%+-]+$ ]] || word="${word@Q}"
    words+=("${word}")
  done
  printf '%s' "${words[*]}"
}

# The names of 90 variables would hide the rest: they stand in VARIABLES, which show_variables prints
show_command() {
  local text
  text="$(quoted "$@")"
  # shellcheck disable=SC2016  # the reader's shell expands it
  printf '%s\n' "${text/"${shown:-no variables}"/'$VARIABLES'}"
}

show_variables() {
  [[ "${DRY_RUN}" == 1 && "${CONT}" != none ]] || return 0
  shown="$(variable_options)"
  printf "VARIABLES='%s'\n" "${shown}"
}

# shellcheck disable=SC2034  # run.sub reads stop_status
interrupt() { # status reason
  [[ -z "${stop_reason}" ]] || return 0
  stop_status="$1" stop_reason="$2"
  say "${stop_reason}"
  [[ -z "${child}" ]] || kill -TERM "${child}" 2>/dev/null || true
}

# ---- The container: one per job and node, named after the job, as Pyxis silently takes an older one of the same name ------

create_container() {
  [[ "${CONT}" != none ]] || return 0
  container="llama2_lora_${job}_${restart}"
  "create_${LAUNCHER}_container" ||
    die 1 "CONT=${CONT}: the container cannot be made (see above); check the image's name, credentials and free disk space"
}

create_slurm_container() {
  ((restart == 0)) || remove_from_nodes || true # those of a former life; the former bookings try again
  say "creating container ${container} on every node"
  supervise srun --export=ALL --nodes="${DGXNNODES}" --ntasks="${DGXNNODES}" --ntasks-per-node=1 \
    --container-image="${CONT}" --container-name="${container}" --no-container-mount-home true
}

# KILL as stop signal: `sleep` as process 1 ignores all others, and podman would wait ten seconds for it
create_local_container() {
  local mount mounts limit options=(--detach --rm --name "${container}" --network=host --ipc=host --stop-signal=KILL
    --user "$(id -u):$(id -g)" --env HOME=/tmp --env USER --workdir "${WORKDIR}")
  for limit in ${DOCKER_ULIMITS}; do options+=(--ulimit "${limit}"); done
  if [[ "${DOCKER##*/}" == podman ]]; then
    ((EUID == 0)) || options+=(--userns=keep-id) # else the user's files are another's in the container
    [[ "${PLATFORM}" != gpu ]] || options+=(--device nvidia.com/gpu=all)
  else
    [[ "${PLATFORM}" != gpu ]] || options+=(--gpus all)
  fi
  IFS=, read -ra mounts <<<"${CONT_MOUNTS}"
  for mount in "${mounts[@]}"; do options+=(--volume "${mount}"); done
  supervise "${DOCKER}" run "${options[@]}" "${CONT}" sleep infinity && return
  [[ -z "${DOCKER_ULIMITS}" ]] ||
    complain "where a --ulimit is refused: DOCKER_ULIMITS= leaves them out (the host must then allow locked memory, for RDMA)"
  return 1
}

# What is stopped here may run on in a container, whose processes are not this one's children, while its log says aborted
end_stragglers() {
  [[ "${LAUNCHER}" == local && -n "${container}" && "${DRY_RUN}" != 1 ]] || return 0
  "${DOCKER}" exec "${container}" bash -c 'kill -KILL -1' || true # all but process 1 and itself
}
