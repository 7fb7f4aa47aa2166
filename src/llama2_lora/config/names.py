"""Names of variables that nothing reads, and what may have been meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator

from llama2_lora.config.settings import variables
from llama2_lora.findings import Finding, one_line

# fmt: off
# What run.sub and the scripts that it calls read besides settings (docs/launch.md)
LAUNCHER = frozenset((
    "BIND", "CONT", "CONT_MOUNTS", "DATADIR", "DATESTAMP", "DOCKER", "DOCKER_ULIMITS", "DROP_CACHES",
    "DROP_CACHES_COMMAND", "DRY_RUN", "EXTRA_MOUNTS", "GPU_CLOCKS", "HEALTH", "LAUNCHER", "LOGDIR", "MASTER_ADDR",
    "MASTER_PORT", "MODEL", "NCCL_TEST", "PYTHON", "REHEARSE", "RULESET", "STOP_ON_FAILURE", "TREE", "VBOOST", "WORKDIR",
))
# Libraries and systems that read the environment: a name that starts so is theirs
LIBRARIES = (
    "CUBLAS_", "CUDA_", "CUDNN_", "ENROOT_", "GLOO_", "GOMP_", "HF_", "KMP_", "LC_", "LD_", "MELLANOX_", "MKL_", "NCCL_",
    "NVIDIA_", "NVTE_", "OMPI_", "OMP_", "PMIX_", "PMI_", "PYTHON", "PYTORCH_", "PYXIS_", "SALLOC_", "SBATCH_", "SHARP_",
    "SLURM_", "SRUN_", "TOKENIZERS_", "TORCHELASTIC_", "TORCH_", "TRANSFORMERS_", "TRITON_", "UB_", "UCX_", "XDG_",
)
# fmt: on
OURS = ("LR", "LORA_", "FP4", "FP8", "EVAL_", "VAL_", "WARMUP_", "DGX")  # nobody else's variables start so
CLOSE = 0.85  # difflib's ratio: one wrong letter in a name of six or more


def unknown(names: Iterable[str], ours: bool) -> Iterator[Finding]:
    """One finding per name that nothing reads. `ours`: a config exports them, and all are told: one that looks like a setting's
    is an error, since the config means what will not happen. Otherwise they are a whole shell's, where it is a warning."""
    known = variables() | LAUNCHER
    for name in sorted(set(names) - known):
        close = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.5 if name.startswith(OURS) else CLOSE)
        if name.startswith(LIBRARIES) and not close:
            continue
        like_a_setting = bool(close) or name.startswith(OURS)
        if ours or like_a_setting:
            meant = f"; is {close[0]} meant?" if close else ""
            level = "error" if ours and like_a_setting else "warning"
            yield Finding(level, "unknown variable", f"{one_line(name)}: nothing reads it{meant}")
