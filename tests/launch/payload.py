"""Stands in for train.py where a test is about the launch: the same settings and the same log in a second, or a failure.

PAYLOAD lists one word per trial; the trial follows from SEED, which counts up from FIRST_SEED. One word is for all trials.
  pass         a log that the compliance checker accepts
  missed       the target is not reached: exit status 1
  silent       exit status 0, but a log without evaluations
  exit3        rank 1 exits with status 3 while the others wait
  killed       rank 3 dies of SIGKILL while the others wait
  hang         every rank waits, and has a child that does, until somebody ends them
  hang_once    hang, but pass after a requeue
  flood        a megabyte of text, and then pass
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))
from llama2_lora.config.settings import Settings
from llama2_lora.mlperf_log import MLPerfLog, submission_values

FIRST_SEED = 100
BUILT = dict(
    opt_adamw_weight_decay=1e-4, opt_gradient_clip_norm=0.3, lora_rank=16, lora_alpha=32, train_samples=40, eval_samples=13
)


def main() -> int:
    settings = Settings.from_env()
    rank, seed = settings.system.rank, settings.run.seed
    words = os.environ["PAYLOAD"].split()
    what = words[seed - FIRST_SEED] if len(words) > 1 else words[0]
    if what == "hang_once":
        what = "pass" if os.environ.get("SLURM_RESTART_COUNT", "0") != "0" else "hang"
    log = MLPerfLog(rank)
    log.init_start()
    log.describe(submission_values(settings))
    log.describe(BUILT | {"opt_base_learning_rate": settings.optimization.lr, "seed": seed})
    log.describe(
        {
            "opt_learning_rate_training_steps": settings.optimization.max_steps,
            "opt_learning_rate_warmup_factor": 0.0,
            "global_batch_size": settings.global_batch_size,
            "gradient_accumulation_steps": settings.batch.gradient_accumulation_steps,
        }
    )
    log.init_stop()
    log.run_start()
    log.block_start(0)
    wait_for_rank_0(rank, "started")
    misbehave(what, rank)
    log.block_stop(0)
    if what != "silent":
        log.eval_start(16)
        log.eval_accuracy(0.95 if what == "missed" else 0.92, 16)
        log.eval_stop(16)
    log.run_stop(what != "missed", 16)
    wait_for_rank_0(rank, "ended")
    return int(what == "missed")


def wait_for_rank_0(rank: int, what: str) -> None:
    """The ranks of a training go together: none may end the run before rank 0 has written what it has to say."""
    flag = Path(os.environ["RESULTS_PATH"]) / f".{os.environ['SEED']}_{what}"
    if rank == 0:
        flag.touch()
    while not flag.exists():
        time.sleep(0.05)


def misbehave(what: str, rank: int) -> None:
    if what == "exit3" and rank == 1:
        sys.exit(3)
    if what == "killed" and rank == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "flood" and rank == 0:
        for _ in range(20000):
            print("a line of a library that fills the disk", flush=True)
    if what in ("exit3", "killed", "hang"):
        subprocess.Popen(["sleep", "1000"])
        time.sleep(1000)


if __name__ == "__main__":
    sys.exit(main())
