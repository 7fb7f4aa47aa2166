#!/usr/bin/env python3
"""Ten logs -> the folder that one submits: systems/, benchmarks/ with this code, results/, passed by the official checkers.

    scripts/package_submission.py LOGDIR --system my_system.json --output submission

Where my_system.json does not exist it is written, with what the logs know; fill in the rest. Whatever is missing or against the
rules is listed at once, and then nothing is made. Exit status: 0 made, 1 refused, 2 wrong usage.

Rules: training_rules.adoc (§) of mlcommons/training_policies, submission_rules.adoc (S) of mlcommons/policies.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging.handlers
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from llama2_lora.config import rules
from llama2_lora.judge.checks import judge
from llama2_lora.judge.results import CONFIG_KEYS, Summary
from llama2_lora.judge.run import Run

ROOT = Path(__file__).resolve().parents[1]
IMPLEMENTATION = "nemo"
STATUS = {  # the log's word -> the system description's, S "Results categories"
    "onprem": "Available on-premise",
    "cloud": "Available cloud",
    "preview": "Preview",
    "research": "Research, Development, or Internal (RDI)",
}
# S "<system_desc_id>.json metadata": fields that need a meaningful answer, and those that may stay empty
REQUIRED = (
    *("submitter", "division", "status", "system_name", "number_of_nodes", "host_processors_per_node"),
    *("host_processor_model_name", "host_processor_core_count", "host_memory_capacity", "host_storage_type"),
    *("host_storage_capacity", "host_networking", "host_networking_topology", "host_memory_configuration"),
    *("accelerators_per_node", "accelerator_model_name", "accelerator_host_interconnect"),
    *("accelerator_memory_configuration", "accelerator_memory_capacity", "accelerator_interconnect", "cooling"),
    *("framework", "other_software_stack", "operating_system"),
)
OPTIONAL = (
    *("host_processor_vcpu_count", "host_processor_frequency", "host_processor_caches", "host_processor_interconnect"),
    *("accelerator_frequency", "accelerator_on-chip_memories", "accelerator_interconnect_topology"),
    *("hw_notes", "sw_notes"),
)
REFUSED_WARNINGS = ("placeholder", "warm caches", "rehearsal")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="LOGDIR")
    parser.add_argument(
        "--system", type=Path, required=True, metavar="FILE", help="system description, JSON, named after the system"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="DIR/<submitter> must not exist")
    parser.add_argument("--ruleset", choices=rules.RULESETS, default="5.1.0", help="rules to check by (5.1.0)")
    parser.add_argument("--accept-unconverged", action="store_true", help="take one run that failed to converge (§12)")
    arguments = parser.parse_args(argv)
    if not arguments.folder.is_dir():
        parser.error(f"{arguments.folder}: is not a folder")
    summary = judge(arguments.folder, arguments.ruleset)
    problems = [*run_problems(summary, arguments.accept_unconverged)]
    system, system_problems = read_system(arguments.system, summary)
    problems += [*system_problems, *code_problems(summary)]
    target = arguments.output / _file_name(str(system.get("submitter") or "submitter"))
    if target.exists():
        problems.append(f"{target}: exists; remove it or choose another --output")
    problems = problems or build(target, summary, arguments.system.stem, system, arguments.ruleset)
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    if problems:
        print(f"refused: {len(problems)} problems, nothing was made", file=sys.stderr)
        return 1
    print(f"made {target}: the package, system description and repository checkers pass ({arguments.ruleset})")
    return 0


# ---- What stands against it ------------------------------------------------------------------------------------------


def run_problems(summary: Summary, accept_unconverged: bool) -> Iterator[str]:
    """Why these runs are no result, each with its rule."""
    runs, needed = summary.runs, rules.RUNS_PER_RESULT
    if len(runs) != needed:
        yield f"{len(runs)} runs: a result needs exactly {needed} (§12); take all that were run, not the best"
    yield from mixed_configs(summary)
    failed = [run for run in runs if not run.converged]
    accepted = failed if accept_unconverged and len(failed) == 1 else []
    for run in runs:
        if run not in accepted:
            yield from _own_problems(run)
    if failed and not accepted:
        hint = "; --accept-unconverged takes it as the slowest run" if len(failed) == 1 else ""
        yield f"{len(failed)} of {len(runs)} runs did not converge: at most one may, and is dropped (§12){hint}"
    for result in summary.results:
        yield from (f"{f.where}: {f.text}" for f in result.findings if f.level == "error")
        if result.score.rcp_passed is False:
            yield f"convergence against the reference (RCP, {summary.ruleset}): failed, {result.score.rcp}"


def mixed_configs(summary: Summary) -> Iterator[str]:
    for key in CONFIG_KEYS:
        seen: dict[str, Run] = {}
        for run in summary.runs:
            if key in run.values:
                seen.setdefault(str(run.values[key]), run)
        if len(seen) > 1:
            where = ", ".join(f"{value} in {run.path.name}" for value, run in seen.items())
            yield f"mixed configs: {key} is {where}; a result is one system and one set of hyperparameters (§2.2, §9.1)"


def _own_problems(run: Run) -> Iterator[str]:
    for message in run.compliance:
        yield f"{run.path}: compliance checker: {message.splitlines()[0]}"
    for finding in run.findings:
        if finding.level == "error" or finding.code in REFUSED_WARNINGS:
            yield f"{finding.where}: {finding.text}"


def read_system(path: Path, summary: Summary) -> tuple[dict[str, Any], list[str]]:
    """The system description, and what is missing in it or contradicts the logs."""
    known = known_fields(summary)
    try:
        if not path.exists():
            path.write_text(json.dumps({f: known.get(f, "") for f in (*REQUIRED, *OPTIONAL)}, indent=2) + "\n")
            print(f"wrote {path}: fill in its empty fields")
        system = dict(json.loads(path.read_text()))
    except OSError as error:
        return {}, [f"{path}: {error.strerror}"]
    except (ValueError, TypeError) as error:
        return {}, [f"{path}: is not a JSON object: {error}"]
    problems = [
        f'{path}: "{name}" is missing; the rules require an answer (S "system_desc_id.json")'
        for name in REQUIRED
        if not str(system.get(name, "")).strip()
    ]
    problems += [f'{path}: field "{name}" must exist, may be ""' for name in OPTIONAL if name not in system]
    for name, value in known.items():
        if name != "system_name" and system.get(name) and str(system[name]) != value:
            problems.append(f'{path}: "{name}" is {str(system[name])!r}, the logs say {value!r}')
    return {name: str(value) for name, value in system.items()}, problems


def known_fields(summary: Summary) -> dict[str, str]:
    """What the logs say of the system."""
    if not summary.runs:
        return {}
    run = summary.runs[0]
    found = {
        "submitter": run.values.get("submission_org"),
        "division": run.values.get("submission_division"),
        "status": STATUS.get(str(run.values.get("submission_status"))),
        "system_name": run.values.get("submission_platform"),
        "number_of_nodes": run.system.nodes,
        "accelerators_per_node": run.system.per_node,
    }
    return {name: str(value) for name, value in found.items() if value is not None}


def code_problems(summary: Summary) -> Iterator[str]:
    files = code_files()
    if not files:
        yield f"{ROOT}: is not a git checkout, so its files cannot be told from other ones; run this from a clone"
    for path in files:
        if " " in str(path):
            yield f"{path}: a file name with a space (repo_checker)"
    for config in sorted({str(run.values.get("config_filename", "")) for run in summary.runs}):
        if not config:
            yield "config_filename is not in the logs: were they made by this code? (S 5.10)"
        elif files and Path(config) not in files:
            yield f"{config}: the runs' config is not in this code; replication needs it (S 5.10)"


def code_files() -> list[Path]:
    """Tracked files, but those whose names begin with a dot: the repository checker refuses them."""
    paths = (Path(name) for name in _git("ls-files", "-z").split("\0") if name)
    return [p for p in paths if not any(part.startswith(".") for part in p.parts) and (ROOT / p).is_file()]


def _git(*arguments: str) -> str:
    """What git says of this checkout; empty where it is none."""
    if shutil.which("git") is None:
        return ""
    return subprocess.run(["git", "-C", ROOT, *arguments], capture_output=True, text=True, check=False).stdout


# ---- The tree --------------------------------------------------------------------------------------------------------


def build(target: Path, summary: Summary, system_id: str, system: dict[str, Any], ruleset: str) -> list[str]:
    """Make the tree, let the official checkers look at a copy, move it into place; what they object to."""
    name = _file_name(system_id)
    with tempfile.TemporaryDirectory() as folder:
        tree, copy = Path(folder, "tree"), Path(folder, "copy")
        _write(tree / "systems" / f"{name}.json", json.dumps(system, indent=2) + "\n")
        for index, run in enumerate(summary.runs):
            result = tree / "results" / name / rules.NAME / f"result_{index}.txt"
            _write(result, "")
            shutil.copyfile(run.path, result)
        implementations = tree / "benchmarks" / rules.NAME / "implementations"
        for path in code_files():
            (implementations / IMPLEMENTATION / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / path, implementations / IMPLEMENTATION / path)
        write_instructions(implementations / name, name, summary)
        shutil.copytree(tree, copy)  # the package checker writes scaling.json where it reads
        objections = official_objections(copy, ruleset)
        if not objections:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(tree, target)
    return objections


def write_instructions(folder: Path, name: str, summary: Summary) -> None:
    """What S "Directory structure" asks for beside the code: metadata, README.md and three scripts."""
    config = summary.results[0].config
    source = config["config_filename"]
    code = f'cd "$(dirname "$0")/../{IMPLEMENTATION}"'
    _write(folder / f"{name}_{IMPLEMENTATION}.json", json.dumps(config, indent=2) + "\n")
    readme = f"""# {rules.NAME} on {name}

Run setup.sh, init_datasets.sh and run_and_time.sh, in this order. They read CONT (image), DATADIR, MODEL and LOGDIR (folders).
The code is in ../{IMPLEMENTATION} (revision {_git("describe", "--always", "--dirty").strip()}), its config is {source}.
"""
    _write(folder / "README.md", readme)
    download = (
        'docker run --rm --volume "${DATADIR:?}:/data/gov_report" --volume "${MODEL:?}:/data/model" "${CONT:?}" bash -euc "\n'
        "  python scripts/download_dataset.py --data_dir /data/gov_report\n"
        '  python scripts/download_model.py --model_dir /data/model"'
    )
    scripts = {
        "setup.sh": 'docker build --tag "${CONT:?image name}" .',
        "init_datasets.sh": download,
        "run_and_time.sh": f'source {source}\nsbatch -N "${{DGXNNODES}}" -t "${{WALLTIME}}" run.sub',
    }
    for file, command in scripts.items():
        _write(folder / file, f"#!/usr/bin/env bash\nset -euo pipefail\n{code}\n{command}\n")
        (folder / file).chmod(0o755)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _file_name(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "_", text).strip("._")


# ---- The official checkers -------------------------------------------------------------------------------------------


def official_objections(folder: Path, ruleset: str) -> list[str]:
    """What mlperf_logging's package_checker (with system_desc_checker, compliance, seeds, RCP) and repo_checker say."""
    from mlperf_logging.package_checker import package_checker
    from mlperf_logging.repo_checker import repo_checker

    with captured_log() as said:
        systems = package_checker.check_systems(str(folder), "training", ruleset)
        results = package_checker.check_training_result_files(
            str(folder), "training", ruleset, True, False, False, False, False
        )
        repo_checker.run_checks(str(folder))
    messages = [record.getMessage().strip() for record in said]
    passed = systems and results and "ALL CHECKS PASSED." in messages  # run_checks returns False in any case
    errors = [r.getMessage().strip().splitlines()[0] for r in said if r.levelno >= logging.ERROR]
    return [] if passed else [f"official checkers: {text}" for text in errors or ["failed without a message"]]


@contextlib.contextmanager
def captured_log() -> Iterator[list[logging.LogRecord]]:
    """The checkers speak through the root logger, print and warn; keep what they say off the screen."""
    handler, root = logging.handlers.BufferingHandler(sys.maxsize), logging.getLogger()
    before, level = root.handlers[:], root.level
    root.handlers[:], root.level = [handler], logging.INFO
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield handler.buffer
    finally:
        root.handlers[:], root.level = before, level


if __name__ == "__main__":
    sys.exit(main())
