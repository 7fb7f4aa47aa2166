#!/usr/bin/env bash
# What the Dockerfile runs as root in the base: on one with torch, the pinned packages beside its torch and Transformer Engine; on
# any other (Debian 12, or an image with Python 3.11), the CPU environment of the rehearsal in /opt/llama2_lora.
#   install_image.sh packages   before the code is there, so that a change of the code does not install them anew
#   install_image.sh project    the project itself, editable; login shells; a look at what Python now imports
#   install_image.sh login VENV the login shells alone
set -euo pipefail

readonly VENV=/opt/llama2_lora
export VENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
export PIP_BREAK_SYSTEM_PACKAGES=1 UV_BREAK_SYSTEM_PACKAGES=1 UV_NO_CACHE=1
# NVIDIA's images set these to pins of their own, which contradict ours
unset PIP_CONSTRAINT PIP_BUILD_CONSTRAINT UV_CONSTRAINT UV_BUILD_CONSTRAINT UV_OVERRIDE

die() {
  printf 'install_image.sh: error: %s\n' "$@" >&2
  exit 1
}

has_torch() { python -c 'import importlib.metadata as m; m.version("torch")' 2>/dev/null; }

# An environment that uv made has no pip
pip_install() {
  if python -m pip --version >/dev/null 2>&1; then
    python -m pip install "$@"
  elif command -v uv >/dev/null; then
    uv pip install --python "$(command -v python)" "$@"
  else
    die "$(command -v python) has neither pip nor uv"
  fi
}

# Packages that belong to the base's CUDA and driver, as NAME==VERSION
kept() {
  python - <<'P'
import importlib.metadata, re

names = re.compile(r"torch|torchvision|torchaudio|triton|pytorch[-_]triton|flash[-_]attn|nvidia[-_].*", re.I)
print(*sorted({f"{d.name}=={d.version}" for d in importlib.metadata.distributions() if names.fullmatch(d.name or "")}), sep="\n")
P
}

# The core with its kernels is a wheel; the extension is compiled against the base's torch. A build has no GPU, so the version
# that is there is read and not tried.
install_transformer_engine() {
  local version cuda
  version="$(sed -n 's/^transformer_engine==\([0-9.]*\).*/\1/p' requirements.txt)"
  if python -c 'import importlib.metadata as m; print(m.version("transformer_engine"))' 2>/dev/null |
    grep -qE "^${version%.*}([.+]|$)"; then
    return
  fi
  cuda="$(python -c 'import torch; print(torch.version.cuda.split(".")[0])')"
  # Hopper and Blackwell alone: every further architecture adds minutes
  NVTE_FRAMEWORK=pytorch NVTE_CUDA_ARCHS="90;100;103" \
    pip_install --no-build-isolation --no-deps "transformer_engine==${version}" \
    "transformer_engine_cu${cuda}==${version}" "transformer_engine_torch==${version}"
}

install_beside_torch() {
  local scratch before replaced
  scratch="$(mktemp -d)" before="${scratch}/constraint.txt"
  kept >"${before}"
  # Transformer Engine's own wheel has no kernels: the base's, or the build below, must not be replaced by it
  grep -v '^transformer_engine==' requirements.txt >"${scratch}/requirements.txt"
  pip_install --constraint "${before}" -r "${scratch}/requirements.txt"
  install_transformer_engine
  # What came in addition may stay: an nvidia-* package that ours needs and the base lacked
  replaced="$(kept | comm -23 <(sort "${before}") <(sort))"
  rm -r "${scratch}"
  [[ -z "${replaced}" ]] || die "the base's packages were replaced:" "${replaced}"
}

install_cpu() {
  if ! python3 -c 'import ensurepip' 2>/dev/null; then
    apt-get update
    DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends python3 python3-venv
    rm -rf /var/lib/apt/lists/*
  fi
  scripts/setup_env.sh
}

install_project() {
  if has_torch && [[ ! -d "${VENV}" ]]; then
    pip_install --no-deps --no-build-isolation -e .
  else
    scripts/setup_env.sh
  fi
}

# Enroot runs what it is told in a login shell, and Debian's /etc/profile sets PATH anew, whatever the image says
install_login() { # venv
  cat >"${LOGIN_PROFILE:-/etc/profile.d/llama2_lora.sh}" <<P
[ ! -d "$1/bin" ] || PATH="$1/bin:\${PATH}"
[ -w "\${HOME:-/nowhere}" ] || HOME=/tmp
export PATH HOME
P
}

main() {
  cd "$(dirname "${BASH_SOURCE[0]}")/../.."
  case "${1:-}" in
    packages) if has_torch; then install_beside_torch; else install_cpu; fi ;;
    project)
      install_project
      install_login "${VENV}"
      if has_torch; then python scripts/check_image.py; else "${VENV}/bin/python" scripts/check_image.py; fi
      ;;
    login) install_login "$2" ;;
    *) die "usage: $0 packages|project|login VENV" ;;
  esac
}

main "$@"
