"""The tree that one submits: made beside its place, looked at by the official checkers, then renamed.

    <submitter>/systems/<system>.json
    <submitter>/results/<system>/llama2_70b_lora/result_0.txt ... result_9.txt, power/, scaling.json
    <submitter>/benchmarks/llama2_70b_lora/implementations/nemo/       this code
    <submitter>/benchmarks/llama2_70b_lora/implementations/<system>/   how to run it there

scaling.json is what the official package checker itself writes beside the runs of a result that converged faster than the
reference, and what the result summarizer reads: published submissions carry it. The rules do not ask for it; without it the
summarizer would give the score without its scaling.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging.handlers
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama2_lora.config import rules
from llama2_lora.files import new_folder
from llama2_lora.judge.results import Summary
from llama2_lora.judge.submission import Code

IMPLEMENTATION = "nemo"
RESULTS, IMPLEMENTATIONS = Path("results"), Path("benchmarks", rules.NAME, "implementations")


class Refused(ValueError):
    """The official checkers' objections."""

    def __init__(self, objections: list[str]) -> None:
        super().__init__("; ".join(objections))
        self.objections = objections


@dataclass(frozen=True)
class Entry:
    """One system's part of a submission."""

    name: str  # folder name of the system
    system: dict[str, Any]
    summary: Summary
    config: str
    code: Code


def tree_problems(target: Path, entry: Entry) -> Iterator[str]:
    """Why an entry cannot join what stands at `target`; nothing where nothing stands there."""
    if not target.exists():
        return
    if not (target / "systems").is_dir():
        yield f"{target}: exists and is no submission; remove it or choose another --output"
        return
    if (target / "systems" / f"{entry.name}.json").exists() or (target / RESULTS / entry.name).exists():
        yield f"{target}: system {entry.name} exists in it; remove it or choose another --output"
    there = target / IMPLEMENTATIONS / IMPLEMENTATION
    other = [p for p in entry.code.files if not _same(entry.code.root / p, there / p)] if there.is_dir() else []
    if other:
        text = f"holds other code than this checkout ({len(other)} files, such as {other[0]})"
        yield f"{there}: {text}; all systems of a submitter have one implementation: package them from one revision"


def _same(ours: Path, theirs: Path) -> bool:
    return theirs.is_file() and ours.read_bytes() == theirs.read_bytes()


def build(target: Path, entry: Entry, ruleset: str) -> list[str]:
    """Make the tree, or add the entry to one that is there; what stands against it, and then nothing is changed."""
    made = next((p for p in reversed(target.parents) if not p.exists()), None)  # the first folder that we have to make
    try:
        with new_folder(target, replace=True) as tree:
            if target.is_dir():
                shutil.copytree(target, tree, dirs_exist_ok=True)
            _write_entry(tree, entry)
            _look(tree, entry, ruleset)
    except Refused as refused:
        problems = refused.objections
    except shutil.Error as error:
        problems = [f"--output {target}: {error.args[0][0][2] if error.args and error.args[0] else error}"]
    except OSError as error:
        problems = [f"--output {target}: {error.strerror or error}"]
    else:
        return []
    if made is not None:
        shutil.rmtree(made, ignore_errors=True)
    return problems


def _look(tree: Path, entry: Entry, ruleset: str) -> None:
    """The checkers read a copy, since they write where they read; of that only scaling.json is kept."""
    with tempfile.TemporaryDirectory(dir=tree.parent, prefix=".check_") as folder:
        copy = Path(folder, "copy")
        shutil.copytree(tree, copy)
        if objections := official_objections(copy, ruleset):
            raise Refused(objections)
        scaling = RESULTS / entry.name / rules.NAME / "scaling.json"
        if (copy / scaling).is_file():
            shutil.copyfile(copy / scaling, tree / scaling)


def _write_entry(tree: Path, entry: Entry) -> None:
    _write(tree / "systems" / f"{entry.name}.json", json.dumps(entry.system, indent=2, ensure_ascii=False) + "\n")
    results = tree / RESULTS / entry.name / rules.NAME
    results.mkdir(parents=True)
    for index, run in enumerate(entry.summary.runs):
        shutil.copyfile(run.path, results / f"result_{index}.txt")
        power = run.path.parent / "power" / run.path.stem
        if power.is_dir():
            shutil.copytree(power, results / "power" / f"result_{index}")
    implementations = tree / IMPLEMENTATIONS
    for path in entry.code.files:
        (implementations / IMPLEMENTATION / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(entry.code.root / path, implementations / IMPLEMENTATION / path)
    _write_instructions(implementations / entry.name, entry)


def _write_instructions(folder: Path, entry: Entry) -> None:
    """What S "Directory structure" asks for beside the code: metadata, README.md and three scripts."""
    values = entry.summary.results[0].config | {"config_filename": entry.config}
    code = f'cd "$(dirname "$0")/../{IMPLEMENTATION}"'
    _write(folder / f"{entry.name}_{IMPLEMENTATION}.json", json.dumps(values, indent=2) + "\n")
    readme = f"""# {rules.NAME} on {entry.name}

Run setup.sh, init_datasets.sh and run_and_time.sh, in this order. They read CONT (image), DATADIR, MODEL and LOGDIR (folders).
The code is in ../{IMPLEMENTATION} (revision {entry.code.revision}), its config is {entry.config}.
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
        "run_and_time.sh": f'source {entry.config}\nsbatch -N "${{DGXNNODES}}" -t "${{WALLTIME}}" run.sub',
    }
    for file, command in scripts.items():
        _write(folder / file, f"#!/usr/bin/env bash\nset -euo pipefail\n{code}\n{command}\n")
        (folder / file).chmod(0o755)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


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
