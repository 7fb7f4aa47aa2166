#!/usr/bin/env bash
# The clocks of one node's GPUs, for run.sub, outside any container: sets what this user may, warns of what not and why, and puts
# back what it found. Needs root, or sudo without a password for nvidia-smi.
#   gpu_clocks.sh set FILE VBOOST CLOCKS   as nvidia-smi boost-slider --vboost and --lock-gpu-clocks take them; empty: leave alone
#   gpu_clocks.sh restore FILE             FILE_HOST holds what was there: a requeued job finds what its first life did
set -euo pipefail

memory='' # file of what this node had; set by main
output='' # nvidia-smi's; set by change
said=''   # the line of it that tells; set by change

say() { printf 'run.sub: %s: %s\n' "$(hostname)" "$*"; }

# nvidia-smi ends with status 0 where a GPU has no clocks to lock: "Treating as warning and moving on"
change() { # arguments of nvidia-smi
  local command=(nvidia-smi "$@") refused='not supported|permission|invalid|not found|unknown|password'
  ((EUID == 0)) || command=(sudo -n "${command[@]}")
  local status=0
  output="$("${command[@]}" 2>&1)" || status=$?
  ((status != 0)) || ! grep -qiE "${refused}" <<<"${output}" || status=1
  said="$(grep -iE "${refused}" <<<"${output}" || printf '%s' "${output}")"
  said="${said%%$'\n'*}"
  return "${status}"
}

# Of all GPUs; more than one word where they differ
vboost() { nvidia-smi boost-slider --list 2>/dev/null | awk '$3 == "vboost" { print $5 }' | sort -u | paste -sd' '; }

remembered() { grep -qs "^$1 " "${memory}"; } # what

remember() { # what value; the value that was there first stays
  remembered "$1" || printf '%s %s\n' "$1" "$2" >>"${memory}"
}

forget() { sed -i "/^$1 /d" "${memory}"; } # what

# A change that failed may have reached some of the GPUs: it is taken back at once. The note goes if all are as they were found.
set_vboost() { # value
  local found now reason known=1
  found="$(vboost)" || true
  case "${found}" in
    '') say "warning: VBOOST=$1: not set: nvidia-smi boost-slider --list shows none (H100 to GB200 have it, B300 and GB300 not)" ;;
    *' '*) say "warning: VBOOST=$1: not set: the GPUs differ (${found}), which could not be put back" ;;
    "$1") say "VBOOST=$1: it was set" ;;
    *)
      remembered vboost || known=0
      remember vboost "${found}"
      if change boost-slider --vboost "$1" && [[ "$(vboost)" == "$1" ]]; then
        say "VBOOST=$1: set, was ${found}"
        return
      fi
      reason="${said:-is persistence mode on (nvidia-smi -pm 1)?}"
      change boost-slider --vboost "${found}" || true
      now="$(vboost)" || true
      say "warning: VBOOST=$1: not set, still ${now:-unknown}: ${reason}"
      [[ "${known}" == 1 || "${now}" != "${found}" ]] || forget vboost
      ;;
  esac
}

# The driver tells nobody which clocks are locked: what is put back is none
set_clocks() { # value
  local reason state='not set' known=1
  remembered clocks || known=0
  remember clocks unlocked
  if change --lock-gpu-clocks="$1"; then
    say "GPU_CLOCKS=$1: locked"
    return
  fi
  reason="${said}"
  ! grep -qi 'clocks set to' <<<"${output}" || state='set on some GPUs' # nvidia-smi's line for a GPU that took them
  ! change --reset-gpu-clocks || state='not set'
  say "warning: GPU_CLOCKS=$1: ${state}: ${reason}"
  [[ "${known}" == 1 || "${state}" != 'not set' ]] || forget clocks
}

restore() {
  local what value status=0
  while read -r what value; do
    if put_back "${what}" "${value}"; then
      say "${what} put back: ${value}"
      forget "${what}"
    else
      say "error: ${what}: could not be put back to ${value}, ${memory} keeps it: ${said}"
      status=1
    fi
  done <"${memory}" # as it was when it was opened: forget makes another file
  ((status != 0)) || rm "${memory}"
  return "${status}"
}

put_back() { # what value
  case "$1" in
    vboost) change boost-slider --vboost "$2" ;;
    clocks) change --reset-gpu-clocks ;;
  esac
}

main() {
  memory="$2_$(hostname)"
  case "$1" in
    set)
      touch "${memory}"
      [[ -z "$3" ]] || set_vboost "$3"
      [[ -z "$4" ]] || set_clocks "$4"
      [[ -s "${memory}" ]] || rm "${memory}"
      ;;
    restore) [[ ! -f "${memory}" ]] || restore ;;
  esac
}

main "$@"
