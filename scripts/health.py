#!/usr/bin/env python3
"""Ask every node whether it is fit to train on, and judge the answers. run.sub calls both parts.

    srun --ntasks-per-node=1 bash -c 'python scripts/health.py probe --node $SLURM_NODEID ...' > probes.jsonl
    python scripts/health.py judge probes.jsonl --nodes 2 --gpus 8 --accelerator H100

`probe` prints one line of JSON. `judge` prints a table of what is bad or could not be checked and exits 1 when
the job must not go on: with --mode fail for any bad finding, otherwise for missing or differing files alone.
Thresholds and their reasons are in src/llama2_lora/node/verdict.py.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

from llama2_lora.packages import missing_package_named

with missing_package_named():
    from llama2_lora.findings import count, exit_status, show
    from llama2_lora.node import probe, verdict


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    probe = commands.add_parser("probe", help="describe this node as a line of JSON")
    probe.add_argument("--node", type=int, default=0, help="index of this node in the job")
    probe.add_argument("--rendezvous", default="127.0.0.1:29400", help="HOST:PORT that node 0 may listen on")
    for name in ("data", "checkpoint", "results"):
        probe.add_argument(f"--{name}", type=Path, required=True, help=f"folder of the {name}, as training will see it")
    judge = commands.add_parser("judge", help="judge all nodes' lines")
    judge.add_argument("probes", type=Path, help="file of JSON lines")
    judge.add_argument("--mode", choices=("off", "warn", "fail"), default="fail", help="what a bad finding does")
    judge.add_argument("--gpus", type=int, required=True, help="GPUs per node")
    judge.add_argument("--accelerator", default="", help="GPU model, such as H100")
    judge.add_argument("--group", type=int, default=1, help="consecutive ranks that NVLink must join: TP * CP")
    judge.add_argument("--allreduce", type=Path, help="output of allreduce_bench.py: judge that instead of the nodes")
    for command in (probe, judge):
        command.add_argument("--nodes", type=int, default=1, help="nodes of the job")
        command.add_argument("--platform", choices=("gpu", "cpu"), default="gpu")
    return parser.parse_args(argv)


def read_probes(path: Path) -> list[dict]:
    """Lines that are not JSON are a library's or a site's banner."""
    lines = [line for line in path.read_text(errors="replace").splitlines() if line.startswith("{")]
    return sorted((json.loads(line) for line in lines), key=lambda seen: seen["node"])


def measured_bandwidth(path: Path) -> float | None:
    found = re.findall(r'"bus_gb_per_s": ([\d.]+)', path.read_text(errors="replace"))
    return float(found[-1]) if found else None


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    if args.command == "probe":
        paths = {"data": args.data, "checkpoint": args.checkpoint, "results": args.results}
        print(json.dumps(probe.probe(args.node, args.nodes, args.rendezvous, args.platform, paths)), flush=True)
        return 0
    try:
        if args.allreduce:
            findings = [verdict.judge_allreduce(measured_bandwidth(args.allreduce), args.nodes, args.accelerator)]
        else:
            probes = read_probes(args.probes)
            findings = verdict.judge(probes, args.nodes, args.gpus, args.platform, args.accelerator, args.group)
    except (OSError, ValueError, KeyError) as error:
        print(f"error: {args.probes}: cannot be judged: {error}", file=sys.stderr)
        return 2
    show((f for f in findings if f.level != "ok" or f.where == verdict.JOB), least="ok")
    print("checks:", count(findings))
    return exit_status(findings, verdict.stops_at(args.mode))


if __name__ == "__main__":
    sys.exit(main())
