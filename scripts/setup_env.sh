#!/usr/bin/env bash
# The environments that are no image. Does nothing where one is up to date.
#   scripts/setup_env.sh          .venv, for rehearsal and tests on a CPU, from requirements-cpu.txt (about 2 minutes, 3 GB)
#   scripts/setup_env.sh --gpu    .venv-gpu, for training on a bare GPU machine: torch 2.9 and Transformer Engine 2.9 for CUDA 13,
#                                 which is compiled here (half an hour; needs nvcc 13, cuDNN's headers and driver 580)
#   scripts/setup_env.sh --lock   resolve requirements.txt and pyproject's group "cpu" anew, write requirements-cpu.txt
# VENV names another folder, PYTHON another interpreter (3.11). DRY_RUN=1 prints what --gpu would run.
set -euo pipefail

readonly LINE_EVERY=60 # seconds
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore

die() {
  say "error: $*" >&2
  exit 1
}

say() { printf '[setup] %s\n' "$*"; }

find_python() {
  local candidate
  for candidate in "${PYTHON:-}" python3.11 python3; do
    if [[ -n "${candidate}" ]] && "${candidate}" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null; then
      python="${candidate}"
      return
    fi
  done
  die "no Python 3.11 found: the lock was made for it; set PYTHON=/path/to/python3.11"
}

make_venv() {
  "${python}" -m venv "$1" 2>/dev/null || {
    say "error: ${python} -m venv failed; on Debian: apt-get install python3-venv" >&2
    exit 1
  }
  "$1/bin/pip" install --quiet --upgrade pip
}

# pip's pages as a line for every fiftieth package, and one a minute while it unpacks
progress() {
  local line seen=0 status
  while true; do
    status=0
    IFS= read -r -t "${LINE_EVERY}" line || status=$?
    if ((status > 128)); then
      say "still at it after ${SECONDS} s"
    elif ((status != 0)); then
      return 0
    elif [[ "${line}" == Collecting* ]] && ((++seen % 50 == 0)); then
      say "${seen} packages found"
    elif [[ "${line}" == Installing* ]]; then
      say "unpacking ${seen} packages"
    fi
  done
}

install() {
  local venv="$1" key="$2"
  say "installing $(grep -c '==' requirements-cpu.txt) packages into ${venv} (about 2 minutes, 3 GB)"
  rm -rf "${venv}"
  make_venv "${venv}"
  # The lock is complete: without resolving, pip is faster and cannot pick another version.
  "${venv}/bin/pip" install --progress-bar off --no-deps -r <(grep -v '^transformer_engine==' requirements-cpu.txt) | progress
  # In a folder of its own, which only PLATFORM=cpu looks into: the wheel has no kernels, and where it is on the path without
  # them, `import peft` and `import megatron.core` end in "Found empty `transformer-engine` meta package installed".
  "${venv}/bin/pip" install --quiet --no-deps --target "${venv}/transformer_engine" \
    "$(grep '^transformer_engine==' requirements-cpu.txt)"
  "${venv}/bin/pip" check --quiet || {
    say "error: the installed packages contradict each other; see above" >&2
    exit 1
  }
  printf '%s\n' "${key}" >"${venv}/.complete" # last: an interrupted install is made anew
}

# The project itself, editable: what runs is this tree, whatever the folder that a command is called from.
install_project() {
  local venv="$1"
  [[ -f pyproject.toml && "$(cat "${venv}/.project" 2>/dev/null)" != "${PWD}" ]] || return 0
  # setuptools is in the lock: no isolation, no network
  "${venv}/bin/pip" install --quiet --no-deps --no-build-isolation -e .
  printf '%s\n' "${PWD}" >"${venv}/.project"
}

run() {
  if [[ "${DRY_RUN:-0}" == 1 ]]; then
    printf '%q ' "$@"
    printf '\n'
  else
    "$@"
  fi
}

# torch and the rest first: Transformer Engine's extension is compiled against the torch that is there. Its own dependencies must not
# move a pin, so requirements.txt is named again.
install_gpu() { # venv
  local venv="$1" torch engine
  torch="$(pin torch gpu)" engine="$(sed -n 's/^transformer_engine==\([0-9.]*\).*/\1/p' requirements.txt)"
  if [[ "${DRY_RUN:-0}" != 1 ]]; then
    command -v nvcc >/dev/null || die "nvcc is not on PATH: install the CUDA toolkit 13, or use the image, which needs neither"
    rm -rf "${venv}"
  fi
  run "${python}" -m venv "${venv}"
  run "${venv}/bin/pip" install --upgrade pip
  # PyPI's torch 2.9 is built for CUDA 12.8
  run "${venv}/bin/pip" install --index-url https://download.pytorch.org/whl/cu130 "torch==${torch}"
  run "${venv}/bin/pip" install --group gpu -r requirements.txt
  run env NVTE_FRAMEWORK=pytorch NVTE_CUDA_ARCHS="90;100;103" "${venv}/bin/pip" install --no-build-isolation \
    "torch==${torch}" "transformer_engine[core_cu13,pytorch]==${engine}" -r requirements.txt
  run "${venv}/bin/pip" install --no-deps --no-build-isolation -e .
  run "${venv}/bin/python" scripts/check_image.py
}

pin() { # package, group of pyproject.toml
  "${python}" -c 'import sys, tomllib
group = tomllib.load(open("pyproject.toml", "rb"))["dependency-groups"][sys.argv[2]]
print(*(line.split("==")[1] for line in group if line.startswith(sys.argv[1] + "==")))' "$@"
}

lock() {
  local scratch
  scratch="$(mktemp -d)"
  trap 'rm -rf "${scratch}"' EXIT
  make_venv "${scratch}/venv"
  "${scratch}/venv/bin/pip" install --quiet -r requirements.txt --group cpu
  {
    printf '# Every package of the CPU environment, pinned. Made by: scripts/setup_env.sh --lock\n'
    "${scratch}/venv/bin/pip" freeze --all | grep -v "^pip==" | sed 's/+cpu$//'
  } >"${scratch}/lock"
  mv "${scratch}/lock" requirements-cpu.txt
  say "requirements-cpu.txt: $(grep -c '==' requirements-cpu.txt) packages"
}

install_cpu() { # venv
  local venv="$1" key
  key="$(sha256sum requirements-cpu.txt | cut -d' ' -f1)"
  if [[ "$(cat "${venv}/.complete" 2>/dev/null)" == "${key}" ]]; then
    say "environment ${venv} is up to date"
  else
    install "${venv}" "${key}"
    say "environment ${venv} is ready"
  fi
  install_project "${venv}"
}

main() {
  cd "$(dirname "${BASH_SOURCE[0]}")/.."
  local python
  case "${1:-}" in
    -h | --help)
      sed -n '2,/^set /s/^# \{0,1\}//p' scripts/setup_env.sh
      return
      ;;
    '' | --lock | --gpu) ;;
    *) die "unknown argument $1; see scripts/setup_env.sh --help" ;;
  esac
  [[ "${DRY_RUN:-0}" == [01] ]] || die "DRY_RUN=${DRY_RUN}: must be 0 or 1"
  find_python
  case "${1:-}" in
    --lock) lock ;;
    --gpu) install_gpu "${VENV:-.venv-gpu}" ;;
    *) install_cpu "${VENV:-.venv}" ;;
  esac
}

main "$@"
