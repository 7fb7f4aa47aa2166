"""Logs -> figures, findings and scores: known answers, every oddity, the official programs' own verdicts."""

from __future__ import annotations

import importlib.util
import json
import logging
import re
import statistics
import subprocess
import sys
from importlib import resources
from pathlib import Path

import pytest
from mlperf_logging.compliance_checker import mlp_compliance

from helpers import ROOT
from helpers.run_text import CONVERGING, line, run_lines, write_result, write_run
from llama2_lora.judge import published
from llama2_lora.judge.blocks import Block
from llama2_lora.judge.checks import judge
from llama2_lora.judge.page import page
from llama2_lora.judge.report import as_dict
from llama2_lora.judge.results import Summary
from llama2_lora.judge.run import Run
from llama2_lora.judge.systems import accelerator_in


def only_run(folder: Path, ruleset: str = "5.1.0") -> Run:
    (run,) = judge(folder, ruleset).runs
    return run


def codes(run: Run, *levels: str) -> list[str]:
    return [f.code for f in run.findings if not levels or f.level in levels]


def save(folder: Path, lines: list[str], end: str = "\n") -> Path:
    path = folder / "a_1.log"
    path.write_bytes((end.join(lines) + end).encode())
    return path


# ---- Known answers ---------------------------------------------------------------------------------------------------


def test_figures_by_hand(tmp_path: Path) -> None:
    """384 steps of 8 sequences at 4 s and five evaluations of 40 s: 1,736 s; 60 s of init."""
    write_run(tmp_path / "a_1.log", seed=7)
    (tmp_path / "a_1.env").write_text("ACCELERATOR=H100\nDGXNNODES=1\nDGXNGPU=8\n")
    run = only_run(tmp_path)
    assert (run.status, run.complied, run.findings, run.seed) == ("converged", True, [], 7)
    assert run.train_minutes == pytest.approx(1736 / 60)
    assert run.init_minutes == pytest.approx(1.0)
    assert run.eval_share == pytest.approx(200 / 1736)
    assert run.samples_per_second == pytest.approx(2.0)
    assert run.step_seconds == pytest.approx(4.0)
    assert run.sequences_to_converge == 3072
    assert run.blocks[0] == Block(end=768.0, seconds=768.0, sequences=1536)
    # 2 sequences/s x 2,598 TFLOP / (8 x 989 TFLOP/s)
    assert run.mfu() == pytest.approx(0.65672, abs=1e-4)
    assert run.mfu(peak_tflops=2598) == pytest.approx(0.25)
    # medians of envelope.csv while nearly all runs go on: .94013 .93515 .93102 .92748; at 3,072 a twentieth has stopped
    assert run.published_difference() == pytest.approx((-0.13e-3 - 0.15e-3 - 0.02e-3 - 0.48e-3) / 4, abs=1e-6)


@pytest.mark.parametrize("ruleset", ["5.0.0", "5.1.0", "6.0.0", "6.1.0"])
def test_log_of_this_code_complies(tmp_path: Path, ruleset: str) -> None:
    """A log that MLPerfLog itself wrote, as the rehearsal's."""
    done = subprocess.run([sys.executable, "-c", OWN_LOG], capture_output=True, text=True, check=True, cwd=ROOT)
    (tmp_path / "a_1.log").write_text(done.stdout)
    summary = judge(tmp_path, ruleset)
    assert summary.ok
    assert codes(summary.runs[0]) == ["rehearsal"]
    assert summary.runs[0].mfu(peak_tflops=1.0) is None
    assert summary.runs[0].published_difference() is None
    assert "needs 10 runs" in summary.results[0].score.reason


OWN_LOG = """
import sys
sys.path[:0] = ["src", "tests"]
from llama2_lora.mlperf_log import MLPerfLog
from helpers.run_text import VALUES
log = MLPerfLog(rank=0)
log.cache_clear()
log.init_start()
log.describe({**VALUES, "submission_platform": "CPU rehearsal, not a submission", "submission_org": "unofficial",
              "train_samples": 900, "eval_samples": 48, "seed": 3, "config_filename": "config_CPU_1x2x4.sh"})
log.init_stop()
log.run_start()
log.block_start(0)
log.train_loss(1.1, 5e-4, 80)
log.tracked({"throughput": 8.0}, 1536)
log.block_stop(0)
log.eval_start(1536)
log.eval_accuracy(0.91, 1536)
log.eval_stop(1536)
log.run_stop(True, 1536)
"""


# ---- Oddities --------------------------------------------------------------------------------------------------------

NOISE = ["Ünïcödé ☃ noise", "\x00\x01 binary", "100%|####|\r 50%|##  |\r", ":::MLLOGGER is not a log line", "{" * 200]


@pytest.mark.parametrize(
    "lines",
    [
        [f"0: {x}" for x in run_lines()],
        [f" 3%|#  | 1/384\r10%|## |\r0: {x}" for x in run_lines()],
        [f"{x}\r0:  3%|#  | 1/384" for x in run_lines()],
        [x for pair in zip(run_lines(), NOISE * 40, strict=False) for x in pair],
        ["x" * 1024] * 1024 + run_lines() + ["y" * (1 << 20)],
        [x.replace('"train.py"', '"trän☃.py"') for x in run_lines()],
    ],
    ids=["rank prefix", "bare CR before", "bare CR after", "noise", "2 MB of noise", "non-ASCII"],
)
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_noise_changes_nothing(tmp_path: Path, lines: list[str], end: str) -> None:
    save(tmp_path, lines, end)
    run = only_run(tmp_path)
    assert run.status == "converged"
    assert run.complied
    assert run.findings == []
    assert run.train_minutes == pytest.approx(1736 / 60)


def test_key_with_trailing_space(tmp_path: Path) -> None:
    lines = [x.replace('"train_loss"', '"train_loss "') for x in run_lines()]
    save(tmp_path, lines)
    run = only_run(tmp_path)
    assert codes(run) == ["key with space"]
    assert run.train_losses[0] == (96, 1.3)
    assert run.complied


def test_required_key_with_trailing_space_is_the_official_checkers_error(tmp_path: Path) -> None:
    save(tmp_path, [x.replace('"lora_rank"', '"lora_rank "') for x in run_lines()])
    run = only_run(tmp_path)
    assert any("'lora_rank'" in message for message in run.compliance)


def test_truncated_last_line(tmp_path: Path) -> None:
    text = "\n".join(run_lines())
    (tmp_path / "a_1.log").write_text(text[:-25])
    run = only_run(tmp_path)
    (cut,) = [f for f in run.findings if f.code == "damaged line"]
    assert cut.where.endswith(f"a_1.log:{len(run_lines())}")
    assert "cut off" in cut.text
    assert run.status == "unfinished"
    assert not run.complied


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (lambda x: x.replace('"value": 1.3', '"value" 1.3'), "delimiter"),
        (lambda x: x.replace('"metadata"', '"meta"'), "metadata"),
        (lambda x: x.replace('"time_ms": 17', '"time_ms": "soon", "x": 17'), "soon"),
        (lambda x: ':::MLLOG ["a list"]', "list"),
        (lambda x: ":::MLLOG ", "Expecting value"),
        (lambda x: x.replace('{"file"', '["file"').replace("}}", "]}"), "delimiter"),
    ],
    ids=["syntax", "missing field", "time", "list", "empty", "brackets"],
)
def test_damaged_line_is_reported_with_its_place(tmp_path: Path, fault, words: str) -> None:
    lines = run_lines()
    index = next(i for i, x in enumerate(lines) if "train_loss" in x)
    lines[index] = fault(lines[index])
    save(tmp_path, lines)
    run = only_run(tmp_path)
    (finding,) = run.findings
    assert finding.where.endswith(f"a_1.log:{index + 1}")
    assert words in finding.text
    assert run.status == "converged"
    assert run.compliance == ["Log lines had parsing errors."]


def test_times_out_of_order(tmp_path: Path) -> None:
    lines = run_lines()
    index = next(i for i, x in enumerate(lines) if "train_loss" in x)
    lines[index], lines[index + 1] = lines[index + 1], lines[index]
    save(tmp_path, lines)
    run = only_run(tmp_path)
    assert codes(run) == ["out of order"]
    assert run.findings[0].where.endswith(f":{index + 2}")
    assert run.complied


def test_no_run_stop(tmp_path: Path) -> None:
    save(tmp_path, run_lines(losses=CONVERGING[:3])[:-1])
    run = only_run(tmp_path)
    assert (run.status, run.train_minutes, run.complied) == ("unfinished", None, False)
    assert run.samples_per_second == pytest.approx(2.0)
    assert "no run_stop" in codes(run)


@pytest.mark.parametrize("keep", [0, 3, 30])
def test_barely_begun(tmp_path: Path, keep: int) -> None:
    save(tmp_path, ["srun: error", *run_lines()[:keep]])
    summary = judge(tmp_path, "5.1.0")
    assert not summary.ok
    assert [run.status for run in summary.runs] == (["never started"] if keep else [])


@pytest.mark.parametrize("value", ["NaN", "1e999", "-1", "null", '"\\ud800"', "[]", "true", "1e30"])
@pytest.mark.parametrize("key", ["time_ms", "value", "samples_count", "key"])
def test_any_value_anywhere_is_not_fatal(tmp_path: Path, key: str, value: str) -> None:
    """In every fifth line, down to the page and to strict JSON."""
    lines = run_lines()
    pattern = re.compile(rf'("{key}": )("[^"]*"|[\d.]+|null|true)')
    save(tmp_path, [pattern.sub(lambda m: m[1] + value, x) if i % 5 == 0 else x for i, x in enumerate(lines)])
    summary = judge(tmp_path, "5.1.0")
    json.dumps(as_dict(summary), allow_nan=False)
    assert page(summary).encode(errors="replace")


def test_loss_that_is_not_a_number(tmp_path: Path) -> None:
    save(tmp_path, [x.replace("0.931", "NaN") for x in run_lines()])
    run = only_run(tmp_path)
    assert codes(run) == ["no loss"]
    assert (run.status, len(run.evaluations)) == ("converged", 4)


def test_bad_values_are_not_fatal(tmp_path: Path) -> None:
    lines = [*run_lines(global_batch_size="eight", lora_alpha=None, opt_gradient_clip_norm=[1])]
    lines.insert(-1, line(1.8e12, "eval_accuracy", "nan", samples_count="many"))
    save(tmp_path, lines)
    run = only_run(tmp_path)
    assert run.gbs is None
    assert "fixed value" in codes(run)


# ---- The official checker --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "lines",
    [
        run_lines(),
        run_lines(losses=CONVERGING[:4]),
        run_lines(lora_rank=8),
        run_lines(seed=None),
        run_lines(micro_batch_size=None),
        run_lines()[:-1],
        [*run_lines(), ":::MLLOG {"],
        [f"1: \x1b[0m{x}\r" for x in run_lines()],
        run_lines() + run_lines(),
        [],
    ],
)
@pytest.mark.parametrize("ruleset", ["5.1.0", "6.1.0"])
def test_verdict_is_the_official_checkers(tmp_path: Path, lines: list[str], ruleset: str) -> None:
    from llama2_lora.judge.official import compliance_messages
    from llama2_lora.judge.runlog import read_log

    path = save(tmp_path, lines)
    official = mlp_compliance.make_checker("training", ruleset, True, False)
    expected, *_ = mlp_compliance.main(str(path), f"training_{ruleset}/common.yaml", official)
    assert (compliance_messages(read_log(path), ruleset) == []) == expected


def test_log_that_stops_the_checker_does_not_stop_us(tmp_path: Path) -> None:
    """The checker raises on these; what it had queued must not be applied to the next log."""
    write_run(tmp_path / "a_1.log", submission_division="ajar")
    write_run(tmp_path / "b_1.log", seed=2, losses=("none",))
    write_run(tmp_path / "c_1.log", seed=3)
    runs = judge(tmp_path, "5.1.0").runs
    assert ["checker stopped" in " ".join(run.compliance) for run in runs] == [True, True, False]
    assert runs[2].complied


# ---- Checks that it lacks --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"opt_gradient_clip_norm": 1.0}, "fixed value"),
        ({"opt_adamw_weight_decay": 0.01}, "fixed value"),
        ({"lora_alpha": 16}, "fixed value"),
        ({"target_accuracy": 0.93}, "fixed value"),
        ({"eval_samples": 172}, "fixed value"),
        ({"train_samples": 3900}, "fixed value"),
        ({"first": 1152}, "evaluation schedule"),
        ({"every": 192}, "evaluation schedule"),
        ({"status": "success", "losses": CONVERGING[:2]}, "false status"),
        ({"status": "aborted"}, "not converged"),
        ({"losses": CONVERGING[:2]}, "not converged"),
    ],
)
def test_broken_rule(tmp_path: Path, changes: dict, code: str) -> None:
    write_run(tmp_path / "a_1.log", **changes)
    summary = judge(tmp_path, "5.1.0")
    assert code in codes(summary.runs[0], "error")
    assert not summary.runs[0].complied
    assert not summary.ok


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"submission_platform": "SUBMISSION_PLATFORM_PLACEHOLDER"}, "placeholder"),
        ({"submission_org": "UNKNOWN_MLPERF_SUBMITTER"}, "placeholder"),
        ({"submission_org": "unofficial"}, "placeholder"),
        ({"cache_clear": False}, "warm caches"),
        ({"train_loss": 2.6, "context_parallelism": 2}, "inflated train loss"),
        ({"train_loss": 10.3, "context_parallelism": 8}, "inflated train loss"),
        ({"losses": (0.940, 0.935, 0.931, 0.924, 0.923)}, "ran on"),
        ({"losses": (0.95, 0.945, 0.94, 0.935, 0.924)}, "slow convergence"),
    ],
)
def test_warning_breaks_nothing(tmp_path: Path, changes: dict, code: str) -> None:
    write_run(tmp_path / "a_1.log", **changes)
    summary = judge(tmp_path, "5.1.0")
    assert codes(summary.runs[0]) == [code] * len(summary.runs[0].findings)
    assert summary.runs[0].findings
    assert summary.ok


def test_schedule_of_other_batch_sizes(tmp_path: Path) -> None:
    """GBS 72: first after 5,184 sequences, then every 432 (settled by hand in test_schedule.py)."""
    write_run(tmp_path / "a_1.log", global_batch_size=72, first=5184, every=432)
    assert codes(only_run(tmp_path)) == []


def test_data_before_the_clock(tmp_path: Path) -> None:
    lines = run_lines()
    index = next(i for i, x in enumerate(lines) if '"run_start"' in x)
    early = next(x for x in lines if "train_loss" in x)
    save(tmp_path, [*lines[:index], early, *lines[index:]])
    assert "data before run_start" in codes(only_run(tmp_path), "error")


def test_two_runs_in_one_file(tmp_path: Path) -> None:
    save(tmp_path, run_lines() + run_lines(seed=2))
    assert "several runs" in codes(only_run(tmp_path), "error")


def test_rehearsal_may_have_its_own_data_but_must_converge(tmp_path: Path) -> None:
    own = {"submission_platform": "CPU rehearsal, not a submission", "train_samples": 900, "train_loss": 2.6}
    write_run(tmp_path / "good" / "a_1.log", opt_gradient_clip_norm=1.0, **own)
    write_run(tmp_path / "bad" / "a_1.log", losses=CONVERGING[:2], **own)
    good, bad = judge(tmp_path / "good", "5.1.0"), judge(tmp_path / "bad", "5.1.0")
    assert good.ok
    assert codes(good.runs[0]) == ["fixed value", "rehearsal"]
    assert not bad.ok


# ---- Several runs ----------------------------------------------------------------------------------------------------


def test_duplicate_seeds(tmp_path: Path) -> None:
    summary = judge(write_result(tmp_path, 3, seed=5), "5.1.0")
    assert [f.code for f in summary.results[0].findings] == ["duplicate seed"] * 2
    assert not summary.ok


def test_missing_seed(tmp_path: Path) -> None:
    save(tmp_path, run_lines(seed=None))
    summary = judge(tmp_path, "5.1.0")
    assert [f.code for f in summary.results[0].findings] == ["no seed"]
    assert not summary.ok


def test_configs_are_kept_apart(tmp_path: Path) -> None:
    write_result(tmp_path, 2)
    write_run(tmp_path / "b_1.log", seed=9, opt_base_learning_rate=0.0005)
    summary = judge(tmp_path, "5.1.0")
    assert [len(result.runs) for result in summary.results] == [2, 1]
    assert "mixed configs" in [f.code for f in summary.findings]


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def score(folder: Path, **options) -> tuple[Summary, float | None]:
    before = snapshot(folder)
    summary = judge(folder, "5.1.0")
    assert snapshot(folder) == before, "the logs' folder was written to"
    return summary, summary.results[0].score.minutes


def test_olympic_mean_by_hand(tmp_path: Path) -> None:
    """One of 3,456 sequences, eight of 3,456, one of 3,840: the middle eight take 1,728 + 240 = 1,968 s each."""
    slower, slowest = (*CONVERGING[:-1], 0.926, 0.924), (*CONVERGING[:-1], 0.9262, 0.926, 0.924)
    write_result(tmp_path, 10, losses=slower)
    write_run(tmp_path / "241124_3.log", seed=3, losses=slowest)
    summary, minutes = score(tmp_path)
    assert minutes == pytest.approx(1968 / 60)
    assert summary.results[0].score.scaling == 1.0
    assert summary.results[0].score.rcp_passed is True
    assert summary.ok


def test_faster_than_the_reference_is_scaled(tmp_path: Path) -> None:
    """All ten at 3,072: above the checker's bound, below the olympic mean of the reference's runs."""
    summary, minutes = score(write_result(tmp_path))
    scaling = summary.results[0].score.scaling
    file = resources.files("mlperf_logging") / "rcp_checker/training_5.1.0/rcps_llama2_70b_lora.json"
    (reference,) = (r["samples to converge"] for r in json.loads(file.read_text()).values() if r["BS"] == 8)
    assert scaling == pytest.approx(statistics.fmean(sorted(reference)[1:-1]) / 3072)
    assert 1.02 < scaling < 1.05
    assert minutes == pytest.approx(1736 / 60 * scaling)


def test_too_fast_fails_the_rcp(tmp_path: Path) -> None:
    summary, _ = score(write_result(tmp_path, losses=(0.940, 0.935, 0.931, 0.924)))
    assert summary.results[0].score.rcp_passed is False


@pytest.mark.parametrize(("failed", "scored"), [(1, True), (2, False)])
def test_runs_that_did_not_converge(tmp_path: Path, failed: int, scored: bool) -> None:
    """One is dropped as the slowest; with two there is no result (§12)."""
    write_result(tmp_path, losses=(*CONVERGING[:-1], 0.926, 0.924))
    for trial in range(1, failed + 1):
        write_run(tmp_path / f"241124_{trial}.log", seed=trial, losses=CONVERGING[:2])
    summary, minutes = score(tmp_path)
    assert (minutes == pytest.approx(1968 / 60)) if scored else minutes is None
    assert not summary.ok


@pytest.mark.parametrize("count", [1, 9, 11])
def test_score_needs_ten(tmp_path: Path, count: int) -> None:
    summary, minutes = score(write_result(tmp_path, count))
    assert minutes is None
    assert summary.results[0].score.reason == f"score: needs 10 runs, has {count}"
    assert summary.ok


def test_open_division_may_choose_hyperparameters(tmp_path: Path) -> None:
    write_run(tmp_path / "a_1.log", submission_division="open", lora_alpha=64, first=1152)
    run = only_run(tmp_path)
    assert codes(run) == codes(run, "note") == ["fixed value", "evaluation schedule"]


def test_open_division_has_no_rcp(tmp_path: Path) -> None:
    write_result(tmp_path, submission_division="open")
    for log in tmp_path.iterdir():  # the official checker wants epoch_num in the open division
        log.write_text(log.read_text().replace('"samples_count"', '"epoch_num": 1, "samples_count"'))
    summary, minutes = score(tmp_path)
    assert minutes == pytest.approx(1736 / 60)
    assert summary.results[0].score.rcp_passed is None


# ---- Where logs and systems come from --------------------------------------------------------------------------------


def test_files_of_a_job_and_of_a_submission(tmp_path: Path) -> None:
    write_run(tmp_path / "job/241124_1.log")
    for name in ("241124_1.compliance", "241124_allreduce.txt", "compliance_checker.log", "241124_1.log.interrupted_5"):
        (tmp_path / "job" / name).write_text("\n".join(run_lines()))
    write_run(tmp_path / "results/box/llama2_70b_lora/result_0.txt", seed=2, config_filename=None)
    write_run(tmp_path / "results/box/bert/result_0.txt", submission_benchmark="bert")
    (tmp_path / "systems").mkdir()
    described = {"number_of_nodes": "2", "accelerators_per_node": "4", "accelerator_model_name": "NVIDIA GB200"}
    (tmp_path / "systems/box.json").write_text(json.dumps(described))
    summary = judge(tmp_path, "5.1.0")
    assert sorted(result.name for result in summary.results) == ["job", "results/box/llama2_70b_lora"]
    assert [f.code for f in summary.findings] == ["other benchmark"]
    systems = {run.path.name: run.system for run in summary.runs}
    assert (systems["result_0.txt"].accelerator, systems["result_0.txt"].accelerators) == ("GB200", 8)
    assert (systems["241124_1.log"].accelerator, systems["241124_1.log"].accelerators) == ("H100", 8)  # the config's name


def test_sysjson_line_names_the_system(tmp_path: Path) -> None:
    described = {"number_of_nodes": "4", "accelerators_per_node": "8", "accelerator_model_name": "NVIDIA H200"}
    save(tmp_path, [f"+ echo ':::SYSJSON {json.dumps(described)}'", *run_lines(config_filename=None)])
    assert only_run(tmp_path).system.accelerators == 32


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("NVIDIA Blackwell GPU (B200-SXM-180GB)", "B200"),
        ("NVIDIA Blackwell Ultra GPU (GB300)", "GB300"),
        ("NVIDIA H200-NVL-141GB", "H200-NVL"),
        ("NVIDIA H200 NVL", "H200-NVL"),
        ("NVIDIA H200-SXM5-141GB", "H200"),
        ("NVIDIA GH200 96GB", "GH200"),
        ("AMD Instinct MI350X", "MI350X"),
        ("AMD Instinct MI355X 288GB HBM3e", "MI355X"),
        ("Graphcore", ""),
    ],
)
def test_part_in_a_description(text: str, part: str) -> None:
    assert accelerator_in(text) == part


@pytest.mark.parametrize(
    ("platform", "parts"),
    [("4xXE9712x4GB200", 16), ("2xXE9680x8H100-SXM-80GB", 16), ("2xNVIDIA GB200", 8), ("8xH100 box", None)],
)
def test_size_in_a_platforms_name(tmp_path: Path, platform: str, parts: int | None) -> None:
    """Only where the name says both numbers, or the part has trays of four."""
    save(tmp_path, run_lines(config_filename=None, submission_platform=platform))
    assert only_run(tmp_path).system.accelerators == parts


def test_unknown_system_has_no_mfu(tmp_path: Path) -> None:
    save(tmp_path, run_lines(config_filename=None))
    assert only_run(tmp_path).mfu() is None


def test_envelope() -> None:
    rows = published.envelope(8)
    assert [row.sequences for row in rows[:3]] == [1536, 1920, 2304]
    assert all(row.p05 < row.median < row.p95 for row in rows)
    assert rows[0].median == pytest.approx(0.9401, abs=1e-4)
    assert published.envelope(10) == []
    assert {gbs for gbs in range(200) if published.envelope(gbs)} == {8, 9, 16, 18, 64, 72, 128}


def test_envelope_is_compared_only_where_nearly_all_runs_go_on() -> None:
    """At GBS 8 45 of 799 runs had stopped before 3,072; at GBS 18 no published run kept the rules' schedule."""
    assert [row.sequences for row in published.envelope(8) if row.whole] == [1536, 1920, 2304, 2688]
    assert published.envelope(18)
    assert not any(row.whole for row in published.envelope(18))


def test_envelope_of_fp4_is_its_own() -> None:
    """FP4 runs have a loss 0.017 above FP8's until they go over to FP8 (v5.1)."""
    fp4, fp8 = published.envelope(8, "fp4"), published.envelope(8)
    assert fp4[3].median - fp8[3].median == pytest.approx(0.017, abs=2e-3)
    assert "FP4" in published.label(fp4)
    assert published.label(fp8) == "799 published NVIDIA runs, GBS 8, FP8, v4.1 to v5.1"


def test_logging_stays_as_it_was(tmp_path: Path) -> None:
    judge(write_result(tmp_path), "5.1.0")
    assert logging.root.manager.disable == logging.NOTSET
    assert mlp_compliance.yaml.__name__ == "yaml"


def test_envelope_is_what_its_script_makes() -> None:
    """benchmarks/envelope.py, on the curves beside it, gives the file that the package holds, to the letter."""
    spec = importlib.util.spec_from_file_location("envelope", ROOT / "benchmarks/envelope.py")
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    held = made.TARGET.read_text()
    assert made.text() == held
    assert "18,fp8,v5.0,other" in held  # no published run of GBS 18 kept the rules' schedule
    assert "16,fp8,v4.1 v5.0 v5.1,rules,1920,50,50" in held  # 20 of 70 runs evaluated at 1,536 already: left out
