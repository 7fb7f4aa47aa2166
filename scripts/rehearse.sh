#!/usr/bin/env bash
# The rehearsal: the cluster run's code on two CPU cores, from nothing to a judged log. About 6 minutes after the install.
#   scripts/rehearse.sh              generated reports; the target is the benchmark's 0.925
#   scripts/rehearse.sh --text DIR   your own text files (scripts/rehearsal_data.py --help says which); TARGET_LOSS is free
# What it makes lies in rehearsal/, and is used again as long as it is up to date. Exit status: 0 the run reached the
# target and its log passes the compliance checker, else not.
set -euo pipefail

readonly WORK=rehearsal
readonly RULESETS=(5.0.0 5.1.0 6.0.0 6.1.0)

step() { printf '\n[%3ds] %s\n' "${SECONDS}" "$*"; }

# Data, base model and checkpoint: what download_dataset.py and convert_model.py do for the 70B.
prepare() {
  step "Data: documents -> packed rows (${WORK}/data)"
  python scripts/rehearsal_data.py --output "${WORK}/data" "${data_options[@]}"
  step "Base model: a small Llama learns the reports, without summaries (${WORK}/base)"
  # OpenMP's threads spin while they wait; on a machine that has other work, that triples the time.
  OMP_WAIT_POLICY=passive python scripts/rehearsal_model.py --data "${WORK}/data" --output "${WORK}/base"
  step "Checkpoint: Hugging Face -> NeMo (${WORK}/checkpoint)"
  python scripts/convert_model.py --source "${WORK}/base" --output_path "${WORK}/checkpoint"
}

train() {
  # shellcheck source=config_CPU_1x2x4.sh
  source config_CPU_1x2x4.sh
  export DATA_PATH="${PWD}/${WORK}/data/gov_report" CKPT_PATH="${PWD}/${WORK}/checkpoint" RESULTS_PATH="${PWD}/${run}"
  mkdir -p "${run}"
  step "Training: ${DGXNGPU} ranks, config_${DGXSYSTEM}.sh, at most ${MAX_STEPS} steps; log ${log}"
  {
    PYTHONPATH=src python -m llama2_lora.mlperf_log # the data is small and made a moment ago: there is no cache to drop
    torchrun --standalone --nproc-per-node="${DGXNGPU}" --no-python scripts/run_and_time.sh
  } |& tee "${log}" | progress
}

# The log's curves and errors, for the eye; the log itself has everything.
progress() {
  sed -nu -E 's/.*"key": "(train_loss|eval_accuracy)", "value": ([0-9]+\.[0-9]{0,4}).*"samples_count": ([0-9]+).*/\1 \2 after \3 sequences/p; /^error: /p' |
    sed -u -E 's/^train_loss/  train loss/; s/^eval_accuracy/  EVAL LOSS/'
}

judge() {
  local ruleset
  if [[ "${TARGET_LOSS:-0.925}" != 0.925 ]]; then
    step "Verdict: TARGET_LOSS=${TARGET_LOSS} was this run's; the rules and the summary below know 0.925 only"
    python scripts/summarize.py "${run}" --html "${run}/summary.html" || true
    return
  fi
  step "Compliance: mlperf_logging's checker"
  for ruleset in "${RULESETS[@]}"; do
    if python -m mlperf_logging.compliance_checker --usage training --ruleset "${ruleset}" \
      --log_output /dev/null "${log}" >"${log%.log}.compliance_${ruleset}" 2>&1; then
      printf 'ruleset %s: passed\n' "${ruleset}"
    else
      printf 'ruleset %s: FAILED, see %s\n' "${ruleset}" "${log%.log}.compliance_${ruleset}"
      status=1
    fi
  done
  step "Verdict"
  python scripts/summarize.py "${run}" --html "${run}/summary.html" || status=1
}

main() {
  cd "$(dirname "${BASH_SOURCE[0]}")/.."
  local data_options=("$@") stamp run log adapter status=0
  stamp="$(date +%y%m%d%H%M%S)"
  run="${WORK}/runs/${stamp}" log="${WORK}/runs/${stamp}/${stamp}_1.log"
  step "Environment"
  scripts/setup_env.sh
  PATH="${PWD}/${VENV:-.venv}/bin:${PATH}"
  export PATH PYTHONWARNINGS=ignore
  prepare
  train || status=$?
  judge
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
