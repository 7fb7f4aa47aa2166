#!/usr/bin/env bash
# The clocks of one node's GPUs, for run.sub, outside any container: sets what this user may, warns of what not and why, and puts
# back what it found. Needs root, or sudo without a password for nvidia-smi.
#   gpu_clocks.sh set FILE VBOOST CLOCKS   as nvidia-smi boost-slider --vboost and --lock-gpu-clocks take them; empty: leave alone
#   gpu_clocks.sh restore FILE             FILE_HOST holds what was there: a requeued job finds what its first life did
set -euo pipefail

memory='' # file of what this node had; set by main
said=''   # by nvidia-smi; set by change

say() { printf 'run.sub: %s: %s\n' "$(hostname)" "$*"; }

# nvidia-smi ends with status 0 where a GPU has no clocks to lock: "Treating as warning and moving on"
change() { # arguments of nvidia-smi
  local command=(nvidia-smi "$@") refused='not supported|permission|invalid|not found|unknown|password'
  ((EUID == 0)) || command=(sudo -n "${command[@]}")
  local status=0
  said="$("${command[@]}" 2>&1)" || status=$?
  ((status != 0)) || ! grep -qiE "${refused}" <<<"${said}" || status=1
  said="$(grep -iE "${refused}" <<<"${said}" || printf '%s' "${said}")"
  said="${said%%$'\n'*}" # the line that tells
  return "${status}"
}

# Of all GPUs; more than one word where they differ
vboost() { nvidia-smi boost-slider --list 2>/dev/null | awk '$3 == "vboost" { print $5 }' | sort -u | paste -sd' '; }

remembered() { grep -qs "^$1 " "${memory}"; } # what

remember() { # what value; the value that was there first stays
  remembered "$1" || printf '%s %s\n' "$1" "$2" >>"${memory}"
}

forget() { sed -i "/^$1 /d" "${memory}"; } # what

set_vboost() { # value
  local found known=1
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
      else
        say "warning: VBOOST=$1: not set, still $(vboost): ${said:-is persistence mode on (nvidia-smi -pm 1)?}"
        ((known == 1)) || forget vboost
      fi
      ;;
  esac
}

# The driver tells nobody which clocks are locked: what is put back is none
set_clocks() { # value
  local known=1
  remembered clocks || known=0
  remember clocks unlocked
  if change --lock-gpu-clocks="$1"; then
    say "GPU_CLOCKS=$1: locked"
  else
    say "warning: GPU_CLOCKS=$1: not set: ${said}"
    ((known == 1)) || forget clocks
  fi
}

restore() {
  local what value status=0
  while read -r what value; do
    case "${what}" in
      vboost) change boost-slider --vboost "${value}" || status=1 ;;
      clocks) change --reset-gpu-clocks || status=1 ;;
    esac
    ((status != 0)) || say "${what} put back: ${value}"
  done <"${memory}"
  ((status == 0)) || say "error: ${memory}: could not be put back: ${said}"
  ((status != 0)) || rm "${memory}"
  return "${status}"
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
