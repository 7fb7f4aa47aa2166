"""What low precision costs the rehearsal's model in loss: every FP8 recipe and NVFP4 against fp32, over several seeds.

    scripts/rehearse.sh                       # once: data and checkpoint in rehearsal/
    python benchmarks/precision.py            # or: --steps 48 --seeds 1 2 3 --only fp32 nvfp4

One rank, no dropout: what differs between two runs of a seed is the precision alone. All runs share one process, which is
launched with torchrun's variables; what is compared is what they logged. About 10 minutes on an idle core.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean, stdev

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]

FP8 = {"FP8": "1"}
WHOLE = FP8 | {"FP8_PARAMS": "1", "FP8_DPA": "1", "FP8_ACT": "1"}
PRECISIONS = {
    "fp32": {},
    "FP8 delayed": FP8,
    "FP8 delayed; weights, attention, SwiGLU input": WHOLE,
    "FP8 tensorwise": FP8 | {"FP8_RECIPE": "tensorwise", "FP8_PARAMS": "1"},
    "FP8 blockwise": FP8 | {"FP8_RECIPE": "blockwise", "FP8_PARAMS": "1"},
    "MXFP8": FP8 | {"FP8_RECIPE": "mxfp8", "FP8_PARAMS": "1"},
    "NVFP4": {"FP4": "1"},
}
UNSET = {"FP8": "0", "FP4": "0", "FP8_RECIPE": "delayed", "FP8_PARAMS": "0", "FP8_DPA": "0", "FP8_ACT": "0"}


def environment(precision: dict[str, str], seed: int, steps: int, folder: Path, results: Path) -> dict[str, str]:
    """config_CPU_1x2x4.sh on one rank, short, with one evaluation at the end."""
    return (
        UNSET
        | {
            "PLATFORM": "cpu",
            "DGXSYSTEM": "PRECISION_1x1x8",
            "DGXNNODES": "1",
            "DGXNGPU": "1",
            "MINIBS": "8",
            "MBS": "8",
            "VAL_MBS": "16",
            "MAX_SEQLEN": "256",
            "LR": "1e-3",
            "MAX_STEPS": str(steps),
            "LORA_DROPOUT": "0",
            "EVAL_EVERY_SEQUENCES": str(8 * steps),
            "EVAL_SKIP": "0",
            "LOG_EVERY_STEPS": "1",
            "SEED": str(seed),
            "DATA_PATH": str(folder / "data/gov_report"),
            "CKPT_PATH": str(folder / "checkpoint_fp32"),
            "RESULTS_PATH": str(results),
        }
        | precision
    )


def worker(runs: list[dict]) -> None:
    from helpers.training_runs import free_port, train_here

    for run in runs:
        print(f"run {json.dumps(run['name'])}", flush=True)
        started = time.monotonic()
        train_here(run["environment"] | {"MASTER_PORT": free_port()})
        print(f"seconds {time.monotonic() - started:.1f}", flush=True)


def measure(names: list[str], seeds: list[int], steps: int, folder: Path, results: Path) -> dict[str, dict[int, list[float]]]:
    """Precision -> seed -> train losses of every step, then the eval loss."""
    from helpers.training_runs import clean_environment, values

    runs = [
        {"name": [name, seed], "environment": environment(PRECISIONS[name], seed, steps, folder, results)}
        for seed in seeds
        for name in names
    ]
    variables = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    found: dict[str, dict[int, list[float]]] = {name: {} for name in names}
    with subprocess.Popen(
        [sys.executable, __file__, "--worker", json.dumps(runs)],
        env=clean_environment(PYTHONWARNINGS="ignore", **variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        name, seed, log = "", 0, ""
        for line in process.stdout or ():
            if line.startswith("run "):
                (name, seed), log = json.loads(line[4:]), ""
            elif line.startswith("seconds "):
                found[name][seed] = [*values(log, "train_loss"), *values(log, "eval_accuracy")]
                print(f"{name}, seed {seed}: eval loss {found[name][seed][-1]:.5f}, {line[8:].strip()} s", file=sys.stderr)
            else:
                log += line
    if process.returncode:
        raise SystemExit(f"the runs ended with status {process.returncode}")
    return found


def table(found: dict[str, dict[int, list[float]]], steps: int) -> str:
    """Markdown. Differences are taken seed by seed, then averaged; the spread is their standard deviation."""
    seeds = list(found["fp32"])
    rows = [
        f"{steps} steps of 8 sequences, seeds {', '.join(map(str, seeds))}; differences are from fp32 of the same seed.",
        "",
        "| precision | eval loss | eval, from fp32 | train (second half), from fp32 |",
        "| --- | --- | --- | --- |",
    ]
    for name, runs in found.items():
        eval_losses = [runs[seed][-1] for seed in seeds]
        differences = [runs[seed][-1] - found["fp32"][seed][-1] for seed in seeds]
        half = slice(steps // 2, steps)
        train = [mean(runs[seed][half]) - mean(found["fp32"][seed][half]) for seed in seeds]
        rows.append(f"| {name} | {mean(eval_losses):.4f} | {_spread(differences)} | {_spread(train)} |")
    return "\n".join(rows)


def _spread(differences: list[float]) -> str:
    if not any(differences):
        return "0"
    return f"{mean(differences):+.4f}" + (f" ± {stdev(differences):.4f}" if len(differences) > 1 else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / "rehearsal", help="data/ and checkpoint/ of the rehearsal")
    parser.add_argument("--steps", type=int, default=48)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--only", nargs="+", choices=PRECISIONS, default=list(PRECISIONS), help="fp32 is always run")
    parser.add_argument("--results", type=Path, default=Path("/tmp"), help="a folder that the runs may write to")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(json.loads(arguments.worker))
        return
    names = list(dict.fromkeys(["fp32", *arguments.only]))
    found = measure(names, arguments.seeds, arguments.steps, arguments.folder.resolve(), arguments.results)
    print(table(found, arguments.steps))


if __name__ == "__main__":
    main()
