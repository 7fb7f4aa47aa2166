"""CPU time and memory of scripts/summarize.py on many logs, beside the official checker and summarizer on the same ones.

python benchmarks/log_reading.py LOGDIR [copies]     LOGDIR: ten logs; 100 copies are 1,000 logs as 100 results

The official figure is one process that, for each result, runs mlperf_logging's compliance checker on every log, its RCP
checker, and its result summarizer's score: what a submitter runs, without the start of a thousand interpreters.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "summarize.py"
RULESET = "5.1.0"
BIG_MEGABYTES = 400


def main() -> None:
    if sys.argv[1] == "--official":
        official(Path(sys.argv[2]))
        return
    source, copies = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 100
    logs = sorted(f for f in source.iterdir() if f.suffix in (".txt", ".log"))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "round")
        for copy in range(copies):
            target = folder / f"system_{copy}" / "llama2_70b_lora"
            target.mkdir(parents=True)
            for index, log in enumerate(logs):
                text = re.sub(r'"seed", "value": (\d+)', rf'"seed", "value": \g<1>{copy}', log.read_text())
                (target / f"result_{index}.txt").write_text(text)
        count = copies * len(logs)
        ours, said = timed([sys.executable, SCRIPT, folder, "--json", "--ruleset", RULESET])
        page, _ = timed([sys.executable, SCRIPT, folder, "--json", "--html", Path(name, "page.html")])
        theirs, scores = timed([sys.executable, __file__, "--official", folder])
        print(f"{count} logs, {copies} results: summarize {ours:.1f} s of CPU, with the page {page:.1f} s")
        print(
            f"official compliance checker, RCP checker and summarizer: {theirs:.1f} s of CPU, {theirs / ours:.1f} times as much"
        )
        mine = {Path(r["name"]).parts[0]: r["score"]["minutes"] for r in json.loads(said)["results"]}
        same = sum(abs(mine[name] - score) < 1e-9 for name, score in json.loads(scores).items())
        print(f"scores equal: {same} of {copies}")
        memory(Path(name, "big"), logs[0])


def timed(command: list[object]) -> tuple[float, str]:
    """CPU seconds of a command, user and system, and what it printed."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done.stdout


def official(folder: Path) -> None:
    from mlperf_logging.compliance_checker import mlp_compliance
    from mlperf_logging.rcp_checker import rcp_checker
    from mlperf_logging.result_summarizer import result_summarizer

    logging.disable(logging.CRITICAL)
    scores = {}
    with contextlib.redirect_stdout(io.StringIO()):
        for result in sorted(folder.glob("*/llama2_70b_lora")):
            for log in sorted(result.iterdir()):
                checker = mlp_compliance.make_checker("training", RULESET, True, False)
                mlp_compliance.main(str(log), f"training_{RULESET}/common.yaml", checker)
            rcp_checker.check_directory(
                str(result), "training", RULESET, False, False, rcp_pass="pruned_rcps", set_scaling=True
            )
            score, *_ = result_summarizer._compute_strong_score_standalone(
                "llama2_70b_lora", result.parent.name, False, str(result), "training", RULESET
            )
            scores[result.parent.name] = score
    print(json.dumps(scores))


def memory(folder: Path, log: Path) -> None:
    """The peak of one log of 400 MB: once noise, once training losses."""
    folder.mkdir()
    lines = log.read_bytes().splitlines(keepends=True)
    losses = [line for line in lines if b"train_loss" in line]
    for what, filler in (
        ("noise", [b"x" * 200 + b"\n"]),
        ("log lines", losses),
        ("a line without an end", [b" 3%|#   | 1/384\r"]),
    ):
        file = folder / "a.log"
        with file.open("wb") as out:
            out.writelines(lines[:25])
            block = b"".join(filler * (1 + (1 << 20) // sum(map(len, filler))))
            for _ in range(BIG_MEGABYTES * (1 << 20) // len(block)):
                out.write(block)
            out.writelines([b"\n", *lines[25:]])
        started = time.perf_counter()
        subprocess.run([sys.executable, "-c", PEAK, str(SCRIPT), str(file)], check=False)
        print(f"  (the figure above: {file.stat().st_size / 1e6:.0f} MB of {what}, {time.perf_counter() - started:.1f} s)")


PEAK = """
import resource, subprocess, sys
subprocess.run([sys.executable, *sys.argv[1:], "--json"], stdout=subprocess.DEVNULL)
print(f"peak memory {resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024:.0f} MiB", flush=True)
"""


if __name__ == "__main__":
    main()
