"""Follow a running job: show its runs as they grow, until it has ended, was killed, or Ctrl-C."""

from __future__ import annotations

import contextlib
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from rich.console import Group
from rich.live import Live
from rich.markup import escape

from llama2_lora.findings import Finding
from llama2_lora.judge.report import progress_line
from llama2_lora.judge.results import Summary
from llama2_lora.judge.run import Run
from llama2_lora.judge.systems import job_environment
from llama2_lora.judge.terminal import result_table, terminal

SILENCE_MINUTES = 30.0  # the longest that a run may say nothing: its initialization (§11)
# How a log ends whose job was killed: Slurm's own words, run.sub's, and the published scripts'
KILLED = re.compile(
    rb"CANCELLED AT|DUE TO TIME LIMIT|DUE TO PREEMPTION|oom-kill|^run\.sub: trial .* finished|RUNANDTIME_STOP", re.MULTILINE
)
SLURM_JOB = re.compile(r"_(\d+)_\d+\.log$")  # <DATESTAMP>_<trial>.log, DATESTAMP ends with the job's id


def watch(look: Callable[[], Summary], seconds: float, peak_tflops: float | None, stream: TextIO) -> Summary:
    """Look again every `seconds` until as many runs as the job was to make have ended, or it is gone."""
    summary, console, began = look(), terminal(stream), time.time()
    with contextlib.suppress(KeyboardInterrupt), Live(console=console, auto_refresh=False) as live:
        while True:
            tables = [result_table(result, peak_tflops, console.width) for result in summary.results]
            newest = max(summary.runs, key=lambda run: run.path.stat().st_mtime, default=None)
            live.update(Group(*tables, escape(progress_line(newest)) if newest else "no run yet"), refresh=True)
            if newest is not None and (reason := _ended(newest, len(summary.runs) >= trials(summary))):
                if newest.status in ("never started", "unfinished"):
                    summary.findings.append(Finding("warning", "job ended", f"no more is to come: {reason}", str(newest.path)))
                return summary
            if newest is None and time.time() - began > 60 * SILENCE_MINUTES:
                return summary
            time.sleep(seconds)
            summary = look()
    return summary


def trials(summary: Summary) -> int:
    """Runs that the job is to make: NEXP in what run.sub noted, else one."""
    noted = (job_environment(run.path).get("NEXP", "1") for run in summary.runs)
    return max((int(text) for text in noted if text.isdigit()), default=1)


def _ended(run: Run, all_there: bool) -> str:
    """Why nothing more is to come after the newest run; empty while it goes on."""
    under_way = run.status in ("never started", "unfinished")
    if all_there and not under_way:
        return "all trials have ended"
    if under_way and (end := KILLED.search(_tail(run.path))):
        return f"its log says {end[0].decode(errors='replace')!r}"
    if _slurm_knows(run.path) is False:
        return "Slurm has no such job any more"
    silent = (time.time() - run.path.stat().st_mtime) / 60
    return f"nothing was written for {silent:.0f} minutes" if silent > SILENCE_MINUTES else ""


def _tail(path: Path, count: int = 4096) -> bytes:
    """The last lines that stand after the last log line."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - count))
        return file.read().rpartition(b":::MLLOG ")[2].partition(b"\n")[2]


def _slurm_knows(path: Path) -> bool | None:
    """Whether the job still runs or waits; None where that cannot be asked."""
    job, squeue = SLURM_JOB.search(path.name), shutil.which("squeue")
    if job is None or squeue is None:
        return None
    done = subprocess.run([squeue, "--noheader", "--jobs", job[1]], capture_output=True, text=True, check=False, timeout=30)
    if done.returncode == 0:
        return bool(done.stdout.strip())
    return False if "Invalid job id" in done.stderr else None
