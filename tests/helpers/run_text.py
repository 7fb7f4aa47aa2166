"""Run logs as text, with times and losses that a test can work out by hand."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

from helpers import ROOT

START_MS = 1_700_000_000_000
INIT_MS, STEP_MS, EVAL_MS = 60_000, 4_000, 40_000
CONVERGING = (0.940, 0.935, 0.931, 0.927, 0.924)  # GBS 8: reaches 0.925 at 3,072 sequences
VALUES: dict[str, Any] = {
    "submission_benchmark": "llama2_70b_lora",
    "submission_org": "Cobalt",
    "submission_division": "closed",
    "submission_status": "onprem",
    "submission_platform": "8xH100 box",
    "target_accuracy": 0.925,
    "opt_base_learning_rate": 0.0004,
    "opt_adamw_weight_decay": 0.0001,
    "opt_gradient_clip_norm": 0.3,
    "opt_learning_rate_warmup_factor": 0.0,
    "opt_learning_rate_training_steps": 1024,
    "lora_rank": 16,
    "lora_alpha": 32,
    "global_batch_size": 8,
    "gradient_accumulation_steps": 4,
    "train_samples": 3901,
    "eval_samples": 173,
    "micro_batch_size": 1,
    "tensor_parallelism": 4,
    "pipeline_parallelism": 1,
    "context_parallelism": 1,
    "expert_parallelism": 1,
    "config_filename": "config_DGXH100_1x8x4.sh",
    "lowest_numerical_precision_in_linear": "fp8",
    "lowest_numerical_precision_in_attn": "bfloat16",
    "lowest_numerical_precision_in_comm": "bfloat16",
}


def line(time_ms: float, key: str, value: Any = None, **metadata: Any) -> str:
    kind = {"t": "INTERVAL_START", "p": "INTERVAL_END"}.get(key[-1] if key.endswith(("_start", "_stop")) else "")
    event = {"namespace": "", "time_ms": time_ms, "event_type": kind or "POINT_IN_TIME", "key": key, "value": value}
    return ":::MLLOG " + json.dumps(event | {"metadata": {"file": "train.py", "lineno": 1} | metadata})


def run_lines(
    seed: int = 1,
    losses: tuple[float, ...] = CONVERGING,
    *,
    first: int = 1536,
    every: int = 384,
    train_loss: float = 1.3,
    status: str | None = None,
    **values: Any,
) -> list[str]:
    """A run: 60 s of init, four seconds per step of 8 sequences, forty per evaluation, as on eight H100.

    A value of None leaves its key out.
    """
    now = START_MS
    lines = [line(now, "cache_clear", values.pop("cache_clear", True)), line(now, "init_start")]
    lines += [line(now, key, value) for key, value in (VALUES | {"seed": seed} | values).items() if value is not None]
    now += INIT_MS
    lines += [line(now, "init_stop"), line(now, "run_start")]
    done = 0
    for index, loss in enumerate(losses):
        until = first + index * every
        lines.append(line(now, "block_start", samples_count=done))
        for samples in range(done + 96, until + 1, 96):
            lines.append(line(now + (samples - done) / 8 * STEP_MS, "train_loss", train_loss, samples_count=samples))
        now += (until - done) // 8 * STEP_MS
        lines += [line(now, "block_stop", samples_count=done), line(now, "eval_start", samples_count=until)]
        now += EVAL_MS
        lines += [line(now, "eval_accuracy", loss, samples_count=until), line(now, "eval_stop", samples_count=until)]
        done = until
    reached = any(isinstance(loss, float) and loss <= 0.925 for loss in losses)
    return [*lines, line(now, "run_stop", samples_count=done, status=status or ("success" if reached else "aborted"))]


def write_run(path: Path, **changes: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(run_lines(**changes)) + "\n")
    return path


def write_result(folder: Path, count: int = 10, **changes: Any) -> Path:
    """`count` runs with seeds 1, 2, ..., named as run.sub names them."""
    for trial in range(1, count + 1):
        write_run(folder / f"241124_{trial}.log", **({"seed": trial} | changes))
    return folder


def load_script(name: str) -> ModuleType:
    """A file of scripts/ as a module: its main() runs here in a fraction of a new process's time."""
    path = ROOT / "scripts" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
