#!/usr/bin/env bash
# All checks: environment, ruff, mypy, import-linter, shellcheck, shfmt, pytest. Arguments go to pytest:
#   scripts/test.sh                       everything
#   scripts/test.sh tests/config/test_schedule.py -k eval
set -euo pipefail

lint() {
  local shell_files
  mapfile -t shell_files < <(git ls-files '*.sh' run.sub .ci/run)
  ruff check .
  ruff format --check .
  mypy src scripts
  lint-imports --no-cache
  shellcheck -x "${shell_files[@]}"
  shfmt -i 2 -ci -d "${shell_files[@]}"
}

main() {
  if [[ "${1:-}" == --help || "${1:-}" == -h ]]; then
    sed -n '2,/^set /s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    return
  fi
  cd "$(dirname "${BASH_SOURCE[0]}")/.."
  scripts/setup_env.sh
  PATH="${PWD}/${VENV:-.venv}/bin:${PATH}"
  export PATH PYTHONPATH=src OMP_NUM_THREADS=1
  lint
  if (($# > 0)); then
    pytest "$@"
  else
    # Two files at a time: what a file's tests share is made once. The cluster's names are fixed, so its tests go alone.
    pytest -n 2 --dist loadfile --ignore tests/launch
    pytest tests/launch
  fi
}

main "$@"
