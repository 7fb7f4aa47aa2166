"""The official verdicts, by mlperf_logging's own code: compliance of a log, RCP and score of a result.

Its rules and its decisions are used as they are. Three things around them are ours, for speed and for safety: the log is
parsed once (runlog.py), the rules' Python expressions are compiled once, and a run that was checked is not read again for
the score. tests compare each verdict with that of the official commands.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import CodeType
from typing import Any

import yaml
from mlperf_logging.compliance_checker import mlp_compliance

from llama2_lora.config import rules
from llama2_lora.forecast import convergence
from llama2_lora.judge.run import Run
from llama2_lora.judge.runlog import TOKEN, Event, RunLog, samples_count

NOT_CONVERGED = 1e9  # sequences, as rcp_checker.read_submission_file counts such a run


@dataclass
class Score:
    """What the runs of a result are worth. `minutes` is None where there is no score; `reason` says why."""

    minutes: float | None = None
    olympic_minutes: float | None = None
    scaling: float | None = None
    rcp: str = ""  # the RCP checker's message
    rcp_passed: bool | None = None
    sequences: float | None = None  # olympic mean to converge
    reference_sequences: float | None = None  # below this a result is scaled up to it
    bound_sequences: float | None = None  # below this it fails
    reason: str = ""


# ---- Compliance ------------------------------------------------------------------------------------------------------


class _Line:
    """An event as the checker's rules see it: what mlp_parser's LogLine has. The text is made only for a message."""

    __slots__ = ("_event", "key", "lineno", "timestamp", "value")

    def __init__(self, event: Event) -> None:
        self._event, self.key, self.lineno, self.timestamp = event, event.raw_key, event.line, event.time_ms
        self.value = {"value": event.value, "metadata": event.metadata}

    @property
    def full_string(self) -> str:
        return TOKEN.decode() + json.dumps({"time_ms": self.timestamp, "key": self.key, **self.value})


def compliance_messages(log: RunLog, ruleset: str) -> list[str]:
    """What mlperf_logging's compliance checker objects to; empty: the log complies."""
    checker = mlp_compliance.make_checker("training", ruleset, True, False)
    if log.damaged_count:
        checker.put_message("Log lines had parsing errors.")
    lines = [_Line(event) for event in log.events]
    try:
        with _prepared_rules(), quiet_mlperf():
            checker.check_loglines(lines, f"training_{ruleset}/common.yaml")
    except Exception as error:  # it evaluates its rules on whatever the log holds, such as 'nan' <= 0.925
        checker.put_message(f"the checker stopped: {error}")
    finally:
        mlp_compliance.enqueued_configs.clear()  # else they are applied to the next log
    return [*checker.overwritable.values(), *checker.not_overwritable]


@functools.cache
def _compiled(source: str, mode: str) -> CodeType:
    return compile(source, "<mlperf_logging rule>", mode)


def _eval(source: str, names: dict[str, Any], local: dict[str, Any] | None = None) -> Any:
    return eval(_compiled(source, "eval"), names, local)  # the checker's own rules, from its package


def _exec(source: str, names: dict[str, Any], local: dict[str, Any] | None = None) -> None:
    exec(_compiled(source, "exec"), names, local)


class _CachedYAML:
    """Stands in for the yaml module in mlp_compliance, which parses three files of rules again for every log."""

    BaseLoader = yaml.BaseLoader

    @staticmethod
    def load(stream: Any, Loader: Any) -> Any:  # yaml's own argument
        if stream.name not in _rules:
            _rules[stream.name] = yaml.load(stream, Loader=Loader)
        return _rules[stream.name]


_rules: dict[str, Any] = {}


@contextlib.contextmanager
def _prepared_rules() -> Iterator[None]:
    """The compliance checker reads each rule file once and compiles each expression once, which takes most of its time.

    `eval` and `exec` of that one module are shadowed by its globals; mlperf_logging 4.1.68 calls both by these names.
    """
    names = vars(mlp_compliance)
    original = names["yaml"]
    names.update(yaml=_CachedYAML, eval=_eval, exec=_exec)
    try:
        yield
    finally:
        names["yaml"] = original
        del names["eval"], names["exec"]


@contextlib.contextmanager
def quiet_mlperf() -> Iterator[None]:
    """mlperf_logging's checkers report through the root logger; what they find is returned, so nothing is lost."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


# ---- Score -----------------------------------------------------------------------------------------------------------


def official_score(runs: Sequence[Run], division: Any, ruleset: str) -> Score:
    """Olympic mean, RCP verdict and scaling, as mlperf_logging's rcp_checker and result_summarizer come to them."""
    count, needed = len(runs), rules.RUNS_PER_RESULT
    if any(run.rehearsal for run in runs):
        return Score(reason=f"score: needs {needed} runs of the 70B model; a rehearsal has none")
    if count != needed:
        return Score(reason=f"score: needs {needed} runs, has {count}")
    try:
        return _score(runs, division, ruleset)
    except Exception as error:  # the official programs compute on whatever the logs hold
        return Score(reason=f"score: none; mlperf_logging stopped: {error}")


def _score(runs: Sequence[Run], division: Any, ruleset: str) -> Score:
    score, scaling = Score(rcp="open division: not checked"), 1.0
    if division == "closed":
        with quiet_mlperf():
            score.rcp_passed, score.rcp, factor = _rcp(runs, ruleset)
        scaling = factor if score.rcp_passed else 1.0
    valid = sorted(run.train_minutes for run in runs if not run.compliance and run.train_minutes is not None)
    if len(runs) - len(valid) > 1:
        return Score(rcp=score.rcp, rcp_passed=score.rcp_passed, reason=_no_score(len(runs) - len(valid)))
    counted = valid[1 : rules.RUNS_PER_RESULT - 1]  # without the fastest and the slowest; one that failed is the slowest
    score.olympic_minutes = sum(counted) / len(counted)
    score.minutes, score.scaling = score.olympic_minutes * scaling, scaling
    sequences = sorted(_sequences(run) for run in runs)[1:-1]
    score.sequences = sum(sequences) / len(sequences)
    if expected := convergence.expected(int(runs[0].gbs or 0)):
        score.reference_sequences, score.bound_sequences = expected.reference, expected.bound
    return score


def _no_score(failed: int) -> str:
    return f"score: none; {failed} runs broke a rule or did not converge, at most one may (§12)"


def _sequences(run: Run) -> float:
    """As the RCP checker counts: the last evaluation of a run that says it succeeded."""
    if run.reported_status != "success":
        return NOT_CONVERGED
    last = [samples_count(event) for event in run.log.events if event.key == "eval_accuracy"]
    return last[-1] if last and last[-1] is not None else NOT_CONVERGED


def _rcp(runs: Sequence[Run], ruleset: str) -> tuple[bool, str, float]:
    """check_directory's verdict on figures that are known already, in place of a folder of logs."""
    from mlperf_logging.rcp_checker import rcp_checker

    sizes = {run.values.get("global_batch_size") for run in runs}
    if len(sizes) != 1 or runs[0].gbs is None:
        return False, "Batch sizes in files do not match.", 1.0
    sequences = [_sequences(run) for run in runs]
    converged = None if sequences.count(NOT_CONVERGED) > 1 else sequences
    checker, names = _rcp_checker(ruleset), vars(rcp_checker)
    original = {name: names[name] for name in ("get_submission_epochs", "RCP_Checker")}
    names.update(
        get_submission_epochs=lambda *_: (runs[0].gbs, converged, rules.NAME),
        RCP_Checker=lambda *_: checker,
    )
    try:
        verdict = rcp_checker.check_directory(os.devnull, "training", ruleset, False, False, rcp_pass="pruned_rcps")
    finally:
        names.update(original)
    passed, message, factor = verdict
    return bool(passed), str(message), float(factor)


@functools.cache
def _rcp_checker(ruleset: str) -> Any:
    """One checker a ruleset: it searches its bounds with a hundred t-tests. It must neither write nor delete scaling.json."""
    from mlperf_logging.rcp_checker.rcp_checker import RCP_Checker

    class Checker(RCP_Checker):
        def _reset_results_scaling(self, results_dir: str) -> None:
            """The original removes `results_dir`/scaling.json; here there is no such folder."""

        @functools.cache  # noqa: B019  # one instance a ruleset, for the whole process
        def _bound(self, mean: float, stdev: float, runs: int) -> float:
            return float(super()._find_min_acceptable_mean(mean, stdev, runs))

        def _find_min_acceptable_mean(self, mean: float, stdev: float, num_samples_ref: int) -> float:
            return self._bound(mean, stdev, num_samples_ref)

    return Checker("training", ruleset, rules.NAME, False)
