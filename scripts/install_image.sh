#!/usr/bin/env bash
# What the Dockerfile runs as root in the base: on one with torch, the pinned packages beside its torch and Transformer Engine; on
# any other (Debian 12, or an image with Python 3.11), the CPU environment of the rehearsal in /opt/llama2_lora.
set -euo pipefail

export PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore

# Packages that belong to the base's CUDA and driver, as NAME==VERSION
kept() {
  python - <<'P'
import importlib.metadata, re

names = re.compile(r"torch|torchvision|torchaudio|triton|pytorch[-_]triton|flash[-_]attn|transformer[-_]engine.*|nvidia[-_].*", re.I)
print(*sorted({f"{d.name}=={d.version}" for d in importlib.metadata.distributions() if names.fullmatch(d.name or "")}), sep="\n")
P
}

# The core with its kernels is a wheel; the extension is compiled against the base's torch. A build has no GPU, so the version
# that is there is read and not tried.
install_transformer_engine() {
  local version
  version="$(sed -n 's/^transformer_engine==\([0-9.]*\).*/\1/p' requirements.txt)"
  if kept | grep -qiE "^transformer[-_]engine==${version%.*}([.+]|$)"; then
    return
  fi
  local cuda
  cuda="$(python -c 'import torch; print(torch.version.cuda.split(".")[0])')"
  # Hopper and Blackwell alone: every further architecture adds minutes
  NVTE_FRAMEWORK=pytorch NVTE_CUDA_ARCHS="90;100;103" \
    python -m pip install --no-build-isolation --no-deps "transformer_engine==${version}" \
    "transformer_engine_cu${cuda}==${version}" "transformer_engine_torch==${version}"
}

install_beside_torch() {
  local scratch before
  scratch="$(mktemp -d)" before="$(mktemp)"
  # Transformer Engine's wheel has no kernels: the base's own, or the build below, must not be replaced by it
  grep -v '^transformer_engine==' requirements.txt >"${scratch}/requirements.txt"
  kept | grep -viE '^transformer[-_]engine' >"${before}"
  # NVIDIA's images set PIP_CONSTRAINT to pins of their own, which contradict ours
  PIP_CONSTRAINT="${before}" python -m pip install -r "${scratch}/requirements.txt"
  install_transformer_engine
  if ! diff "${before}" <(kept | grep -viE '^transformer[-_]engine'); then
    printf 'error: the base'\''s packages above were replaced\n' >&2
    exit 1
  fi
}

install_cpu() {
  if ! python3 -c 'import ensurepip' 2>/dev/null; then
    apt-get update
    DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends python3 python3-venv
    rm -rf /var/lib/apt/lists/*
  fi
  VENV=/opt/llama2_lora scripts/setup_env.sh
}

main() {
  cd "$(dirname "${BASH_SOURCE[0]}")/.."
  if python -c 'import importlib.metadata as m; m.version("torch")' 2>/dev/null; then
    install_beside_torch
  else
    install_cpu
  fi
}

main "$@"
