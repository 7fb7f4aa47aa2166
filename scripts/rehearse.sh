#!/usr/bin/env bash
# The rehearsal: the cluster run's code on two CPU cores, from nothing to a judged log. About four minutes after the install.
#   scripts/rehearse.sh              generated reports; the target is the benchmark's 0.925
#   scripts/rehearse.sh --gpu        on the GPUs of this machine, in the image: real kernels, FP8; config_GPU_1x*.sh
#   scripts/rehearse.sh --text DIR   your own text files (scripts/rehearsal_data.py --help says which); TARGET_LOSS is free
#   scripts/rehearse.sh --config F   a few steps of a cluster's config_*.sh on two or four CPU ranks, with its precision, overlap
#                                    and healing; every value that is reduced is shown. TARGET_LOSS is 10 unless it is set
# What it makes lies in rehearsal/ (REHEARSAL_DIR), and is used again as long as it is up to date. The run itself is run.sub's,
# without Slurm and without a container. Exit status: 0 the run reached the target and its log passes the compliance checker
# (--config: it trained and evaluated); 2 wrong use; else not.
set -euo pipefail

readonly WORK="${REHEARSAL_DIR:-rehearsal}"
readonly TARGET=0.925 # the benchmark's
readonly SILENCE=60   # seconds after which a long step shows that it lives

step() { printf '\n[%3ds] %s\n' "${SECONDS}" "$*"; }

die() {
  printf 'rehearse.sh: error: %s\n' "$*" >&2
  exit 2
}

# main's gpu (0 or 1), cluster (a config) and options (of rehearsal_data.py)
parse() {
  while (($# > 0)); do
    case "$1" in
      --text)
        [[ -d "${2:-}" ]] || die "--text ${2:-}: is not a folder"
        options+=(--text "$(realpath -- "$2")")
        shift 2
        ;;
      --config)
        [[ -f "${2:-}" ]] || die "--config ${2:-}: is no file"
        cluster="$(realpath -- "$2")"
        shift 2
        ;;
      --gpu)
        gpu=1
        shift
        ;;
      *) die "unknown argument $1; see $0 --help" ;;
    esac
  done
  [[ "${gpu}" == 0 || -z "${cluster}" ]] || die "--config ${cluster}: is reduced to CPU ranks; leave out --gpu"
}

# Held as long as this process or one that it started lives
lock() { # folder
  mkdir -p "$1"
  exec {lock}<>"$1/.lock"
  flock --nonblock "${lock}" || die "another rehearsal (process $(<"$1/.lock")) works in $1/: wait for its end, or clone anew"
  printf '%s\n' "$$" >"$1/.lock"
}

# The config for the GPUs that are visible; with two of them, or three, one is used
config_of() { # 1 with --gpu, else 0
  local gpus
  if (($1 == 0)); then
    echo config_CPU_1x2x4.sh
    return
  fi
  gpus="$(visible_gpus)"
  if ((gpus >= 8)); then
    echo config_GPU_1x8x1.sh
  elif ((gpus >= 4)); then
    echo config_GPU_1x4x2.sh
  elif ((gpus >= 1)); then
    echo config_GPU_1x1x8.sh
  else
    die "--gpu: no GPU is visible; in a container, was it given one (docker run --gpus all)?"
  fi
}

visible_gpus() {
  python -c 'import torch; print(torch.cuda.device_count())' 2>/dev/null || echo 0
}

absolute() { # path
  case "$1" in
    /*) echo "$1" ;;
    *) echo "${PWD}/$1" ;;
  esac
}

# Data, base model and checkpoint: what download_dataset.py and convert_model.py do for the 70B.
prepare() { # dtype, options of rehearsal_data.py...
  step "Data: documents -> packed rows (${WORK}/data)"
  python scripts/rehearsal_data.py --output "${WORK}/data" "${@:2}"
  step "Base model: a small Llama learns the reports, without summaries (${WORK}/base)"
  # OpenMP's threads spin while they wait; on a machine that has other work, that triples the time.
  OMP_WAIT_POLICY=passive python scripts/rehearsal_model.py --data "${WORK}/data" --output "${WORK}/base"
  step "Checkpoint: Hugging Face -> NeMo (${WORK}/checkpoint_$1)"
  python scripts/convert_model.py --source "${WORK}/base" --output_path "${WORK}/checkpoint_$1" --dtype "$1"
}

# A cluster's config means itself, as to preflight: no setting of the caller's shell but TARGET_LOSS, and no clocks
forget_settings() {
  local names
  names="$(PYTHONPATH=src python -c 'from llama2_lora.config import settings; print(*settings.variables() - {"TARGET_LOSS"})')" ||
    return
  # shellcheck disable=SC2086  # many names
  unset ${names} VBOOST GPU_CLOCKS
}

# A cluster's config as two cores bear it: each value that changes is shown
reduce() {
  local changes
  changes="$(TARGET_LOSS='' PYTHONPATH=src python -m llama2_lora.config.reduced)" || return # the closed division fixes it
  printf '%s\n' "${changes}"
  eval "${changes}"
  export TARGET_LOSS="${TARGET_LOSS:-10}" # a few steps reach no target: any loss is to end the run
}

train() { # folder, stamp, config, dtype
  # shellcheck source=config_CPU_1x2x4.sh
  source "$3"
  [[ "$4" != fp32 || "${PLATFORM:-gpu}" != gpu ]] || reduce || return # fp32: the CPU's
  DATADIR="$(absolute "${WORK}/data/gov_report")" MODEL="$(absolute "${WORK}/checkpoint_$4")" LOGDIR="$(absolute "$1")"
  export DATADIR MODEL LOGDIR DATESTAMP="$2"
  export CONT=none LAUNCHER=local HEALTH=warn NCCL_TEST=0
  export PYTHON=python            # the environment's, whatever made it
  export DROP_CACHES_COMMAND=true # the data is small and made a moment ago: there is no cache to drop

  RULESET="$(PYTHONPATH=src python -c 'from llama2_lora.config import rules; print(*rules.RULESETS)')"
  [[ "${TARGET_LOSS:-${TARGET}}" == "${TARGET}" ]] || RULESET=''
  export RULESET
  step "Training: run.sub, ${DGXNGPU} ranks, ${3##*/}, at most ${MAX_STEPS} steps; log $1/$2_1.log"
  mkdir -p "$1"
  local status=0
  bash run.sub |& tee "$1.out" | progress || status=$?
  ((status == 0)) || printf 'all that run.sub said: %s\n' "$1.out"
  return "${status}"
}

# The log's curves, verdicts and errors, for the eye; the log itself has everything.
progress() {
  local line shown="${SECONDS}" status
  while true; do
    status=0
    IFS= read -r -t "${SILENCE}" line || status=$?
    ((status == 0 || status > 128)) || return 0
    if ((status == 0)) && show "${line}"; then
      shown="${SECONDS}"
    elif ((SECONDS - shown >= SILENCE)); then
      printf '  still at it after %d s\n' "${SECONDS}"
      shown="${SECONDS}"
    fi
  done
}

show() { # line; fails where there is nothing to show
  if [[ "$1" =~ \"key\":\ \"(train_loss|eval_accuracy)\",\ \"value\":\ ([^,]+),.*\"samples_count\":\ ([0-9]+) ]]; then
    local name='train loss'
    [[ "${BASH_REMATCH[1]}" == train_loss ]] || name='EVAL LOSS'
    printf '  %s %s after %s sequences\n' "${name}" "$(rounded "${BASH_REMATCH[2]}")" "${BASH_REMATCH[3]}"
  elif [[ "$1" =~ ^(run\.sub: )?((error|no-go): .*|ruleset .*)$ ]]; then
    printf '%s\n' "${BASH_REMATCH[2]}"
  else
    return 1
  fi
}

# Four digits, unless they would say that a target was reached which was not
rounded() { # loss
  awk -v loss="$1" -v target="${TARGET_LOSS:-${TARGET}}" \
    'BEGIN { text = sprintf("%.4f", loss); print (loss + 0 > target + 0 && text + 0 <= target + 0) ? loss : text }'
}

main() {
  local options=() cluster='' stamp run log adapter config gpu=0 dtype=fp32 status=0
  if [[ "${1:-}" == --help || "${1:-}" == -h ]]; then
    sed -n '2,/^set /s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    return
  fi
  parse "$@"
  cd "$(dirname "${BASH_SOURCE[0]}")/.."
  ((gpu == 0)) || dtype=bf16
  config="${cluster:-$(config_of "${gpu}")}"
  lock "${WORK}"
  stamp="$(date +%y%m%d%H%M%S)"
  run="${WORK}/runs/${stamp}" log="${WORK}/runs/${stamp}/${stamp}_1.log"
  if ((gpu == 0)); then # the image has its own
    step "Environment"
    scripts/setup_env.sh
    PATH="${PWD}/${VENV:-.venv}/bin:${PATH}"
  elif [[ "${PYTHON:-}" == */* ]]; then # the job's
    PATH="$(dirname "${PYTHON}"):${PATH}"
  fi
  export PATH PYTHONWARNINGS=ignore
  prepare "${dtype}" "${options[@]}"
  [[ -z "${cluster}" ]] || forget_settings
  train "${run}" "${stamp}" "${config}" "${dtype}" || status=$?
  step "Verdict"
  if [[ -n "${cluster}" ]]; then
    ((status != 0)) || echo "${cluster##*/} trains and evaluates; what the rules ask of a log, a few steps cannot have"
    printf '\nlog      %s\n' "${log}"
    return "${status}"
  fi
  if [[ "${TARGET_LOSS:-${TARGET}}" == "${TARGET}" ]]; then
    python scripts/summarize.py "${run}" --html "${run}/summary.html" || status=1
  else
    echo "TARGET_LOSS=${TARGET_LOSS} was this run's; the rules and the summary below know ${TARGET} only"
    python scripts/summarize.py "${run}" --html "${run}/summary.html" || true
  fi
  printf '\nlog      %s\npage     %s\n' "${log}" "${run}/summary.html"
  adapter="$(find "${run}" -maxdepth 1 -name 'adapter_*')"
  if [[ -n "${adapter}" ]]; then
    printf 'adapter  %s\n' "${adapter}"
    printf 'for PEFT scripts/export_adapter.py --adapter %s --base %s --output DIR, then AutoPeftModelForCausalLM.from_pretrained(DIR)\n' \
      "${adapter}" "${WORK}/base"
  fi
  return "${status}"
}

main "$@"
