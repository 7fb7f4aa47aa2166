"""The page of all shipped configs: what each one sets, what is counted and forecast, what comparable systems took.

python -m llama2_lora.forecast.table > docs/configs.md
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

from llama2_lora.config.settings import Settings
from llama2_lora.config.shell import source
from llama2_lora.forecast.memory import GB
from llama2_lora.forecast.plan import Plan, plan

ROOT = Path(__file__).resolve().parents[3]
COMMAND = "python -m llama2_lora.forecast.table > docs/configs.md"
# (part, GPUs, GBS): minutes, round. Scores of v5.1 and later, which are not in benchmarks/published_results.csv.
LATER = {
    ("B200", 8, 8): (8.9, "v5.1, NVFP4"),
    ("GB300", 8, 8): (6.0, "v5.1, NVFP4"),
    ("GB300", 72, 9): (1.22, "v5.1"),
    ("GB300", 512, 64): (0.40, "v5.1"),
}
INTRODUCTION = f"""# Configs

*For whoever chooses a config, or adds one.* Made by `{COMMAND}`: do not edit.

A config's name says system, nodes, GPUs per node and MINIBS (sequences of one replica per step); GBS is MINIBS times the
replicas. `source` it, then `sbatch -N "$DGXNNODES" -t "$WALLTIME" run.sub`. Memory is counted and time is forecast for this
software (`scripts/preflight.py CONFIG` shows the account); published times are other software's, on as many of the same part
at the same GBS. No time on this page was measured with this software, and none has what this adapter may save
([forecast.md](forecast.md)). `scripts/rehearse.sh --config CONFIG` trains a few steps of any of them on two or four CPU ranks.

| config | GBS | layout | precision | LR | steps | memory, GB | step, s | run, min | published, min |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |
"""


def configs() -> list[Path]:
    return sorted(ROOT.glob("config_*_*x*x*.sh"), key=lambda path: path.name)


def page() -> str:
    return INTRODUCTION + "".join(row(path) + "\n" for path in configs())


def row(config: Path) -> str:
    """A config's line of the table."""
    settings = Settings.from_env(source(config))
    found = plan(settings)
    layout = " ".join(f"{d.group}{d.size}" for d in found.layout if d.size > 1)
    memory, times = found.memory, found.forecast
    cells = (
        f"`{config.name}`",
        f"{found.batch.global_batch_size}",
        layout,
        _precision(settings),
        f"{settings.optimization.lr:g}",
        f"{settings.optimization.max_steps}",
        f"{memory.total / GB:.0f} of {memory.capacity / GB:.0f}: {memory.verdict}" if memory else "",
        f"{times.step_seconds.middle:.2f}" if times else "",
        f"{times.run_minutes.low:.2g} to {times.run_minutes.high:.2g}" if times else "",
        _published(found, settings),
    )
    return f"| {' | '.join(cells)} |"


def _precision(settings: Settings) -> str:
    p = settings.precision
    if p.fp4:
        return "NVFP4"
    if not p.fp8:
        return "fp32" if settings.system.platform == "cpu" else "bf16"
    parts = {"attention": p.fp8_attention, "SwiGLU input": p.fp8_swiglu}
    return ", ".join(["FP8", *(name for name, on in parts.items() if on)])


def _published(found: Plan, settings: Settings) -> str:
    if found.accelerator is None:
        return ""
    system = settings.system
    key = (found.accelerator, system.nodes * system.gpus_per_node, found.batch.global_batch_size)
    with (ROOT / "benchmarks" / "published_results.csv").open() as file:
        rows = [r for r in csv.DictReader(file) if _key(r) == key and r["run_minutes"]]
    entries = {r["round"] for r in rows}
    minutes = sorted(float(r["run_minutes"]) for r in rows)
    text = []
    if minutes:
        spread = f"{minutes[0]:.3g}" + (f" to {minutes[-1]:.3g}" if len(minutes) > 1 else "")
        text.append(f"{spread} ({', '.join(sorted(entries))})")
    if key in LATER:
        text.append("{:.3g} ({})".format(*LATER[key]))
    return "; ".join(text)


def _key(row: dict[str, str]) -> tuple[str, int, int]:
    return row["accelerator"], int(row["nodes"]) * int(row["gpus_per_node"]), int(row["global_batch_size"])


if __name__ == "__main__":
    sys.stdout.write(page())
