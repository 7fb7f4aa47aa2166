"""Which files are runs, which runs are one result, and how findings are told."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from mlperf_logging.result_summarizer import result_summarizer

from helpers import ROOT
from helpers.run_text import CONVERGING, START_MS, line, run_lines, write_result, write_run
from llama2_lora.judge.checks import judge
from llama2_lora.judge.report import as_dict, grouped

SLOWER = (*CONVERGING[:-1], 0.926, 0.924)


def codes(folder: Path) -> list[str]:
    return [finding.code for finding in judge(folder, "5.1.0").all_findings()]


# ---- Power -----------------------------------------------------------------------------------------------------------


def meter(watts: float = 9000.0, efficiency: float = 0.94, seconds: int = 60) -> list[str]:
    """A reading a second after the start; the published dialect has no stop."""
    lines = [line(START_MS, "power_measurement_start"), line(START_MS, "conversion_eff", efficiency, measurement_type="AC")]
    return lines + [line(START_MS + 1000 * i, "power_reading", watts + 10 * (i % 3), host="node_0") for i in range(1, seconds)]


def with_power(folder: Path, count: int = 10) -> Path:
    logs = write_result(folder, count, losses=SLOWER)
    for log in sorted(logs.glob("*.log")):
        place = logs / "power" / log.stem
        place.mkdir(parents=True)
        (place / "node_0.txt").write_text("\n".join(meter()) + "\n")
        (place / "sw_0.txt").write_text(line(START_MS, "interconnect_power_est", 500.0) + "\n")
    return logs


def test_power_logs_are_no_runs(tmp_path: Path) -> None:
    summary = judge(with_power(tmp_path), "5.1.0")
    assert summary.ok
    assert len(summary.runs) == 10
    assert summary.all_findings() == []


def test_power_is_energy_to_target_as_the_official_summarizer_has_it(tmp_path: Path) -> None:
    summary = judge(with_power(tmp_path / "logs"), "5.1.0")
    run = summary.runs[0]
    assert run.power is not None
    assert run.power.mean_watts == pytest.approx(0.94 * 9010 + 500, rel=2e-3)
    official = tmp_path / "official"
    (official / "power").mkdir(parents=True)
    (official / "result_0.txt").write_bytes(run.path.read_bytes())
    (tmp_path / "logs/power/241124_1").rename(official / "power/result_0")
    joules = result_summarizer._compute_total_power(
        str(official), str(official / "result_0.txt"), run.train_minutes * 60e3, "5.1.0"
    )
    assert run.energy_kwh == pytest.approx(joules / 3.6e6)
    row = as_dict(summary)["results"][0]["runs"][0]
    assert row["mean_kilowatts"] == pytest.approx(run.power.mean_watts / 1e3)
    assert as_dict(summary)["results"][0]["cost"]["energy_kwh"] == pytest.approx(10 * run.energy_kwh)


def test_meter_without_a_run_is_named_by_its_keys(tmp_path: Path) -> None:
    write_run(tmp_path / "a_1.log")
    (tmp_path / "meter.txt").write_text("\n".join(meter()) + "\n")
    summary = judge(tmp_path, "5.1.0")
    assert summary.ok
    (finding,) = summary.findings
    assert finding.code == "power log"
    assert "8.4" in finding.text  # kW
    assert finding.where.endswith("meter.txt")


def test_file_without_a_log_line_is_named(tmp_path: Path) -> None:
    write_run(tmp_path / "a_1.log")
    (tmp_path / "notes.txt").write_text("remember the milk\n")
    summary = judge(tmp_path, "5.1.0")
    assert summary.ok
    (finding,) = summary.findings
    assert finding.code == "no log"
    assert "notes.txt" in finding.text


# ---- Results ---------------------------------------------------------------------------------------------------------


def test_names_do_not_split_a_result(tmp_path: Path) -> None:
    write_result(tmp_path, losses=SLOWER)
    write_run(tmp_path / "241124_4.log", seed=4, losses=SLOWER, submission_org="SUBMISSION_ORG_PLACEHOLDER")
    summary = judge(tmp_path, "5.1.0")
    (result,) = summary.results
    assert result.score.minutes is not None
    (finding,) = [f for f in result.findings if f.code == "names differ"]
    assert "'Cobalt' in 9" in finding.text
    assert "'SUBMISSION_ORG_PLACEHOLDER' in 1 (241124_4.log)" in finding.text


@pytest.mark.parametrize("folders", [10, 2])
def test_ten_runs_in_folders_are_a_result(tmp_path: Path, folders: int) -> None:
    for trial in range(10):
        write_run(tmp_path / f"part_{trial % folders}" / f"a_{trial}.log", seed=trial + 1, losses=SLOWER)
    (result,) = judge(tmp_path, "5.1.0").results
    assert result.score.minutes == pytest.approx(1968 / 60)
    assert [f.code for f in result.findings] == ["joined"]


def test_systems_of_a_submission_are_not_joined(tmp_path: Path) -> None:
    for system in ("box", "crate"):
        for trial in range(5):
            write_run(tmp_path / f"results/{system}/llama2_70b_lora/result_{trial}.txt", seed=trial, losses=SLOWER)
    assert [len(result.runs) for result in judge(tmp_path, "5.1.0").results] == [5, 5]


@pytest.mark.parametrize(("first", "second"), [(10, 10), (10, 3), (2, 3)])
def test_jobs_are_told_apart_by_datestamp(tmp_path: Path, first: int, second: int) -> None:
    for stamp, count in (("241124101010_77", first), ("241124202020_78", second)):
        for trial in range(1, count + 1):
            write_run(tmp_path / f"{stamp}_{trial}.log", seed=int(stamp[-2:]) * 100 + trial, losses=SLOWER)
    summary = judge(tmp_path, "5.1.0")
    assert [len(result.runs) for result in summary.results] == [first, second]
    assert [result.score.minutes is not None for result in summary.results] == [first == 10, second == 10]
    assert summary.results[0].name.endswith("241124101010_77")
    assert "several jobs" in [finding.code for finding in summary.findings]


def test_a_job_that_was_submitted_again_is_one_result(tmp_path: Path) -> None:
    for trial in range(10):
        stamp = "241124101010_77" if trial < 4 else "241124202020_78"
        write_run(tmp_path / f"{stamp}_{trial + 1}.log", seed=trial, losses=SLOWER)
    (result,) = judge(tmp_path, "5.1.0").results
    assert result.score.minutes is not None


def test_other_hyperparameters_split(tmp_path: Path) -> None:
    write_result(tmp_path, 3)
    write_run(tmp_path / "241124_9.log", seed=9, gradient_accumulation_steps=2)
    assert [len(result.runs) for result in judge(tmp_path, "5.1.0").results] == [3, 1]


def test_logs_that_repeat_another_results(tmp_path: Path) -> None:
    write_result(tmp_path / "here", 3, losses=SLOWER)
    write_result(tmp_path / "there", 3, losses=SLOWER)
    write_result(tmp_path / "elsewhere", 3, losses=CONVERGING)
    found = [f for result in judge(tmp_path, "5.1.0").results for f in result.findings]
    assert [f.code for f in found] == ["repeated logs"]
    assert "3 of 3 runs repeat those of here" in found[0].text


# ---- Findings --------------------------------------------------------------------------------------------------------


def test_findings_are_told_by_result_and_kind(tmp_path: Path) -> None:
    """Ten runs that break one rule are one line; what one run alone has is its own."""
    write_result(tmp_path / "one", lora_alpha=16, first=1152)
    write_result(tmp_path / "two", 2, lora_alpha=16)
    write_run(tmp_path / "two/241124_2.log", seed=2, lora_alpha=16, cache_clear=False)
    summary = judge(tmp_path, "5.1.0")
    lines = [str(group.finding) for group in grouped(summary)]
    assert len(summary.all_findings()) == 23
    assert len(lines) == 4
    assert re.match(r"error: one: 10 of 10 runs: lora_alpha is 16; .* \(first: .*one/241124_1.log\)", lines[0])
    assert "warm caches" in lines[-1]
    assert str(tmp_path / "two/241124_2.log") in lines[-1]


def test_figures_come_before_findings(tmp_path: Path) -> None:
    write_result(tmp_path, 2, lora_alpha=16)
    command = [sys.executable, ROOT / "scripts/summarize.py", tmp_path]
    said = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout
    assert said.index("seq/s") < said.index("score:") < said.index("error:")


# ---- Score and size --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gbs", "first", "every", "count"),
    [(8, 1536, 384, 5), (8, 1536, 384, 4), (8, 1536, 384, 7), (9, 1548, 387, 5), (16, 1920, 384, 6), (64, 4224, 384, 9)],
)
@pytest.mark.parametrize("ruleset", ["4.1.0", "5.0.0", "5.1.0", "6.1.0"])
def test_score_is_the_official_programs(tmp_path: Path, gbs: int, first: int, every: int, count: int, ruleset: str) -> None:
    from mlperf_logging.rcp_checker import rcp_checker

    losses = (*(0.95 - 0.001 * i for i in range(count - 1)), 0.924)
    for trial in range(10):
        extra = (0.9251,) if trial % 3 == 0 else ()
        changes = {"losses": (*losses[:-1], *extra, 0.924), "global_batch_size": gbs, "first": first, "every": every}
        write_run(tmp_path / f"result_{trial}.txt", seed=trial, **changes)
    ours = judge(tmp_path, ruleset).results[0].score
    passed, message, _ = rcp_checker.check_directory(
        str(tmp_path), "training", ruleset, False, False, rcp_pass="pruned_rcps", set_scaling=True
    )
    minutes, _, scaling = result_summarizer._compute_strong_score_standalone(
        "llama2_70b_lora", "box", False, str(tmp_path), "training", ruleset
    )
    assert (ours.rcp_passed, ours.rcp) == (passed, message)
    assert ours.minutes == pytest.approx(minutes, rel=1e-12)
    assert ours.scaling == pytest.approx(scaling, rel=1e-12)


@pytest.mark.parametrize("filler", [b"x" * 255 + b"\n", b" 3%|##    | 1/384\r", b"y" * 4096])
def test_memory_does_not_grow_with_noise(tmp_path: Path, filler: bytes) -> None:
    """100 MB around a run, as lines, as a progress bar or as one endless line."""
    text = "\n".join(run_lines()).encode()
    with (tmp_path / "a_1.log").open("wb") as file:
        file.write(text[:5000].rpartition(b"\n")[0] + b"\n")
        for _ in range(100):
            file.write(filler * ((1 << 20) // len(filler)))
        file.write(b"\n" + text[5000 - len(text[:5000].rpartition(b"\n")[2]) :] + b"\n")
    # A process of its own between: this one may have had larger children
    program = (
        "import resource, subprocess, sys; subprocess.run(sys.argv[1:]);"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, file=sys.stderr)"
    )
    command = [sys.executable, "-c", program, sys.executable, ROOT / "scripts/summarize.py", tmp_path, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert json.loads(done.stdout)["results"][0]["runs"][0]["samples_per_second"] == pytest.approx(2.0)
    assert int(done.stderr.split()[-1]) / 1024 < 300
