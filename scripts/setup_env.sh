#!/usr/bin/env bash
# The CPU environment of rehearsal and tests: .venv from requirements-cpu.txt. Does nothing where it is up to date.
#   scripts/setup_env.sh          make or renew it (about 2 minutes, 3 GB)
#   scripts/setup_env.sh --lock   resolve requirements.txt and pyproject's group "cpu" anew, write requirements-cpu.txt
# VENV names another folder, PYTHON another interpreter (3.11).
set -euo pipefail

say() { printf '[setup] %s\n' "$*"; }

find_python() {
  local candidate
  for candidate in "${PYTHON:-}" python3.11 python3; do
    if [[ -n "${candidate}" ]] && "${candidate}" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null; then
      python="${candidate}"
      return
    fi
  done
  say "error: no Python 3.11 found: the lock was made for it; set PYTHON=/path/to/python3.11" >&2
  exit 1
}

make_venv() {
  "${python}" -m venv "$1" 2>/dev/null || {
    say "error: ${python} -m venv failed; on Debian: apt-get install python3-venv" >&2
    exit 1
  }
  "$1/bin/pip" install --quiet --disable-pip-version-check --upgrade pip
}

install() {
  local venv="$1" key="$2"
  say "installing $(grep -c '==' requirements-cpu.txt) packages into ${venv} (about 2 minutes, 3 GB)"
  rm -rf "${venv}"
  make_venv "${venv}"
  # The lock is complete: without resolving, pip is faster and cannot pick another version.
  "${venv}/bin/pip" install --quiet --disable-pip-version-check --no-deps -r <(grep -v '^transformer_engine==' requirements-cpu.txt)
  # In a folder of its own, which only PLATFORM=cpu looks into: the wheel has no kernels, and where it is on the path without
  # them, `import peft` and `import megatron.core` end in "Found empty `transformer-engine` meta package installed".
  "${venv}/bin/pip" install --quiet --disable-pip-version-check --no-deps --target "${venv}/transformer_engine" \
    "$(grep '^transformer_engine==' requirements-cpu.txt)"
  "${venv}/bin/pip" check --quiet --disable-pip-version-check || {
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
  "${venv}/bin/pip" install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
  printf '%s\n' "${PWD}" >"${venv}/.project"
}

lock() {
  local scratch
  scratch="$(mktemp -d)"
  trap 'rm -rf "${scratch}"' EXIT
  make_venv "${scratch}/venv"
  "${scratch}/venv/bin/pip" install --quiet --disable-pip-version-check -r requirements.txt --group cpu
  {
    printf '# Every package of the CPU environment, pinned. Made by: scripts/setup_env.sh --lock\n'
    "${scratch}/venv/bin/pip" freeze --all | grep -v "^pip==" | sed 's/+cpu$//'
  } >"${scratch}/lock"
  mv "${scratch}/lock" requirements-cpu.txt
  say "requirements-cpu.txt: $(grep -c '==' requirements-cpu.txt) packages"
}

main() {
  cd "$(dirname "${BASH_SOURCE[0]}")/.."
  local python venv="${VENV:-.venv}" key
  find_python
  if [[ "${1:-}" == --lock ]]; then
    lock
    return
  fi
  key="$(sha256sum requirements-cpu.txt | cut -d' ' -f1)"
  if [[ "$(cat "${venv}/.complete" 2>/dev/null)" == "${key}" ]]; then
    say "environment ${venv} is up to date"
  else
    install "${venv}" "${key}"
    say "environment ${venv} is ready"
  fi
  install_project "${venv}"
}

main "$@"
