"""What stands against a submission: its runs, its system description, its code. Each problem is a line with its rule.

Rules: training_rules.adoc (§) of mlcommons/training_policies, submission_rules.adoc (S) of mlcommons/policies.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama2_lora.config import rules
from llama2_lora.files import new_file
from llama2_lora.judge.results import CONFIG_KEYS, Summary
from llama2_lora.judge.run import Run

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


@dataclass(frozen=True)
class Code:
    """The checkout that made the runs. `files`: what is tracked, relative, but those whose names begin with a dot, which the
    repository checker refuses; none where the folder is no checkout."""

    root: Path
    files: tuple[Path, ...]
    revision: str

    @classmethod
    def of(cls, root: Path) -> Code:
        paths = (Path(name) for name in _git(root, "ls-files", "-z").split("\0") if name)
        kept = (p for p in paths if not any(part.startswith(".") for part in p.parts) and (root / p).is_file())
        return cls(root, tuple(kept), _git(root, "describe", "--always", "--dirty").strip())


def _git(root: Path, *arguments: str) -> str:
    """What git says of a checkout; empty where it is none."""
    if shutil.which("git") is None:
        return ""
    return subprocess.run(["git", "-C", root, *arguments], capture_output=True, text=True, check=False).stdout


def folder_name(text: str) -> str:
    """A name of letters and digits of any script, dots, dashes and underscores; empty where nothing of the text is one."""
    return re.sub(r"[^\w.-]+", "_", text).strip("._-")


def run_problems(summary: Summary, accept_unconverged: bool) -> Iterator[str]:
    """Why these runs are no result, each with its rule."""
    runs, needed = summary.runs, rules.RUNS_PER_RESULT
    if len(runs) != needed:
        yield f"{len(runs)} runs: a result needs exactly {needed} (§12); take all that were run, not the best{_jobs(runs)}"
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


def _jobs(runs: Sequence[Run]) -> str:
    """Where the logs are of several jobs: of which, by what run.sub's names begin with. A first trial may share the folder."""
    jobs = Counter(run.path.stem.rpartition("_")[0] for run in runs)
    if len(jobs) < 2:
        return ""
    counted = ", ".join(f"{name}_* ({count})" for name, count in jobs.items())
    return f"; they are of {len(jobs)} jobs: {counted}; move one's away"


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


# ---- System description ----------------------------------------------------------------------------------------------


def read_system(path: Path, summary: Summary) -> tuple[dict[str, Any], list[str]]:
    """The system description, and what is missing in it or contradicts the logs."""
    known = known_fields(summary)
    try:
        if not path.exists():
            if not path.parent.is_dir():
                return {}, [f"--system {path}: {path.parent} is no folder"]
            with new_file(path) as file:
                file.write((json.dumps({f: known.get(f, "") for f in (*REQUIRED, *OPTIONAL)}, indent=2) + "\n").encode())
            print(f"wrote {path}: fill in its empty fields", flush=True)  # before the errors, in a pipe too
        system = dict(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        return {}, [f"--system {path}: {error.strerror}"]
    except (ValueError, TypeError) as error:
        return {}, [f"{path}: is not a JSON object: {error}"]
    problems = []
    empty = [name for name in REQUIRED if not str(system.get(name, "")).strip()]
    if empty:
        rule = 'the rules require an answer (S "system_desc_id.json")'
        problems.append(f"{path}: {len(empty)} fields are empty or missing; {rule}: {', '.join(empty)}")
    if absent := [name for name in OPTIONAL if name not in system]:
        problems.append(f'{path}: fields must exist, may be "": {", ".join(absent)}')
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


# ---- Code ------------------------------------------------------------------------------------------------------------


def configs(summary: Summary, given: str | None) -> list[str]:
    """Config files of the runs: what the logs say, else the one that was given."""
    return sorted({str(run.values.get("config_filename") or given or "") for run in summary.runs})


def code_problems(summary: Summary, code: Code, given: str | None) -> Iterator[str]:
    if not code.files:
        yield f"{code.root}: is not a git checkout, so its files cannot be told from other ones; run this from a clone"
    for path in code.files:
        if " " in str(path):
            yield f"{path}: a file name with a space (repo_checker)"
    for config in configs(summary, given):
        if not config:
            yield "config_filename is not in the logs; name the runs' config with --config (S 5.10)"
        elif code.files and Path(config) not in code.files:
            yield f"{config}: the runs' config is not in this code; replication needs it (S 5.10)"
