"""scripts/summarize.py as a command: table, JSON, CSV, exit status, the page in a browser, and --watch."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

import pytest

from helpers.run_text import CONVERGING, load_script, run_lines, write_result, write_run
from llama2_lora.judge.charts import ticks

script = load_script("summarize")


@dataclass
class Done:
    """What the command said."""

    status: int
    stdout: str


@pytest.fixture
def summarize(capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    def run(*arguments: object) -> Done:
        status = script.main([str(argument) for argument in arguments])
        return Done(status, capsys.readouterr().out)

    return run


@pytest.fixture(scope="module")
def ten(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten runs that converged; one has an evaluation that looks like markup."""
    return write_result(tmp_path_factory.mktemp("ten"), submission_platform="<b>8xH100</b> & [red]box[/]")


def test_table_and_score(summarize: Callable[..., Done], ten: Path) -> None:
    done = summarize(ten)
    assert done.status == 0
    assert done.stdout.count("converged") == 10 + 1
    assert "<b>8xH100</b> & [red]box[/]" in done.stdout
    assert re.search(
        r"score: 29\.\d+ minutes \(olympic mean 28\.933 min x scaling 1\.0\d+; RCP passed: RCP found; 3,072 sequences",
        done.stdout,
    )
    assert "all runs complied and converged" in done.stdout


def test_json(summarize: Callable[..., Done], ten: Path) -> None:
    summary = json.loads(summarize(ten, "--json", "--ruleset", "6.1.0").stdout)
    assert (summary["ok"], summary["ruleset"], summary["findings"]) == (True, "6.1.0", [])
    (result,) = summary["results"]
    assert result["config"]["global_batch_size"] == 8
    assert result["runs"][0]["losses"][0] == [1536, CONVERGING[0]]
    assert result["runs"][9]["seed"] == 10
    assert result["score"]["rcp_passed"] is True


def test_csv_and_peak(summarize: Callable[..., Done], ten: Path) -> None:
    rows = list(csv.DictReader(io.StringIO(summarize(ten, "--csv", "--peak-tflops", "2598").stdout)))
    assert len(rows) == 10
    assert float(rows[0]["mfu"]) == pytest.approx(0.25)
    assert rows[0]["status"] == "converged"


def test_exit_status(summarize: Callable[..., Done], tmp_path: Path, ten: Path) -> None:
    assert summarize(tmp_path).status == 1  # nothing to judge
    assert summarize(ten / "241124_1.log").status == 0  # one log
    write_run(tmp_path / "a_1.log", losses=CONVERGING[:3])
    assert summarize(tmp_path).status == 1


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["nowhere"],
        [".", "--ruleset", "1.0"],
        [".", "--peak-tflops", "0"],
        [".", "--peak-tflops", "x"],
        [".", "--json", "--csv"],
    ],
)
def test_wrong_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        script.main(arguments)
    assert stopped.value.code == 2
    assert "error:" in capsys.readouterr().err


def test_peak_without_a_number_of_accelerators(summarize: Callable[..., Done], tmp_path: Path) -> None:
    write_run(tmp_path / "a_1.log", config_filename=None)
    done = summarize(tmp_path, "--peak-tflops", "989")
    assert done.status == 0
    assert "number of accelerators unknown" in done.stdout


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 11.9, [0, 5, 10]), (0.919, 0.947, [0.92, 0.93, 0.94]), (1459, 3533, [1500, 2000, 2500, 3000, 3500]), (3, 3, [3])],
)
def test_marks_of_an_axis(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == pytest.approx(expected)


def test_page_that_cannot_be_written(summarize: Callable[..., Done], ten: Path) -> None:
    assert summarize(ten, "--html", ten / "nowhere" / "page.html").status == 2


def test_every_problem_is_printed_with_its_place(summarize: Callable[..., Done], tmp_path: Path) -> None:
    write_run(tmp_path / "a_1.log", losses=CONVERGING[:3], lora_alpha=16)
    done = summarize(tmp_path)
    place = re.escape(str(tmp_path / "a_1.log"))
    assert re.search(rf"error: {place}: compliance checker: Failed checks for eval_accuracy", done.stdout)
    assert re.search(rf"error: {place}: lora_alpha is 16; the rules fix 32 \(§9.1\)", done.stdout)
    assert re.search(rf"error: {place}: not converged: last evaluation loss 0.9310", done.stdout)


# ---- The page --------------------------------------------------------------------------------------------------------


class References(HTMLParser):
    """Everything in a page that could make a browser fetch something, and its balance of tags."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.opened: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.fetched += [f"{tag} {name}={value}" for name, value in attrs if name in ("src", "href", "xlink:href", "data")]
        if tag in ("script", "link", "iframe", "img", "object"):
            self.fetched.append(tag)
        if tag not in ("meta", "line", "circle", "polyline"):
            self.opened.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.opened.pop() == tag


def test_page_needs_nothing_else(summarize: Callable[..., Done], ten: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    assert summarize(ten, "--html", page).status == 0
    text = page.read_text()
    seen = References()
    seen.feed(text)
    assert seen.fetched == []
    assert seen.opened == []
    assert "url(" not in text
    assert "&lt;b&gt;8xH100&lt;/b&gt;" in text


def browser() -> str:
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    found = next((path for name in names if (path := shutil.which(name))), None)
    if found is None:
        (pytest.fail if os.environ.get("REQUIRE_SLURM") == "1" else pytest.skip)("no Chromium: apt-get install chromium")
    return str(found)


def rendered(page: Path, tmp_path: Path, width: int = 1300) -> str:
    """The DOM after layout, without a network. The page's own geometry is read by a probe that only this copy has."""
    probe = tmp_path / "probe.html"
    probe.write_text(page.read_text().replace("</body>", PROBE + "</body>"))
    offline = ["--host-resolver-rules=MAP * ~NOTFOUND", "--disable-background-networking"]
    command = [
        browser(),
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        *offline,
        f"--window-size={width},900",
        f"--user-data-dir={tmp_path}/profile",
    ]
    done = subprocess.run([*command, "--dump-dom", probe.as_uri()], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


PROBE = """<script>
const box = e => e.getBoundingClientRect();
const report = {
  charts: [...document.querySelectorAll("svg.chart")].map(s => ({
    label: s.getAttribute("aria-label"), width: box(s).width, height: box(s).height, runs: s.querySelectorAll(".run").length,
    outside: [...s.querySelectorAll("polyline, polygon, circle, text")].filter(e => box(e).right > box(s).right + 1 ||
      box(e).left < box(s).left - 1 || box(e).top < box(s).top - 1 || box(e).bottom > box(s).bottom + 1).length })),
  bands: document.querySelectorAll("polygon.band").length, bars: document.querySelectorAll("polygon.time").length,
  rows: document.querySelectorAll("tbody tr").length, findings: document.querySelectorAll("#findings li").length,
  title: document.title, heading: document.querySelector("h1").innerText,
  marks: document.querySelectorAll("g.best, g.worst").length,
  hovers: [...document.querySelectorAll("svg.chart circle.hover")].filter(c => c.parentNode.querySelector("title")).length,
  headings: [...document.querySelectorAll("table.runs th")].map(e => e.innerText),
  links: [...document.querySelectorAll("#contents a")]
    .map(e => [e.innerText, !!document.querySelector(e.getAttribute("href"))]),
  firstChart: box(document.querySelector("svg.chart") || document.body).top, height: document.documentElement.scrollHeight,
  findingsTop: box(document.querySelector("#findings")).top,
  lastChart: Math.max(0, ...[...document.querySelectorAll("svg.chart")].map(s => box(s).bottom)),
  smallest: Math.min(99, ...[...document.querySelectorAll("svg.chart text")].map(e => box(e).height)),
  goal: [...document.querySelectorAll("svg text.goal")].map(e => Math.min(...[...e.closest("svg")
    .querySelectorAll(".run circle")].map(c => box(e).left - box(c).right))),
  verdict: document.querySelector("#verdict").innerText, wide: document.documentElement.scrollWidth - innerWidth,
  ink: getComputedStyle(document.body).color, paper: getComputedStyle(document.body).backgroundColor };
document.body.dataset.report = JSON.stringify(report);
</script>"""


def report(dom: str) -> dict:
    (text,) = re.findall(r'data-report="([^"]*)"', dom)
    return json.loads(text.replace("&quot;", '"').replace("&amp;", "&"))


def test_page_in_a_browser(summarize: Callable[..., Done], ten: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    summarize(ten, "--html", page)
    seen = report(rendered(page, tmp_path))
    assert [chart["label"] for chart in seen["charts"]] == [
        "evaluation loss against training sequences",
        "throughput over time",
        "time split",
    ]
    for chart in seen["charts"]:
        assert chart["width"] > 300
        assert chart["height"] > 50
        assert chart["outside"] == 0
    assert [chart["runs"] for chart in seen["charts"]] == [10, 10, 0]
    assert (seen["bands"], seen["bars"], seen["rows"], seen["findings"]) == (1, 30, 10, 0)
    assert seen["marks"] == 4  # the best and the worst run, in two charts
    assert seen["hovers"] == 10 * (5 + 5)  # five evaluations and five blocks of each run say their values
    assert seen["firstChart"] < 300
    assert min(seen["goal"]) > 0  # the target's label is right of every point
    assert seen["verdict"] == "10 runs, rules 5.1.0: all runs complied and converged"
    assert seen["wide"] <= 0
    assert seen["ink"] != seen["paper"]


def test_page_of_broken_runs_in_a_browser(summarize: Callable[..., Done], tmp_path: Path) -> None:
    """Runs that lack almost everything, and every warning on the page."""
    write_run(tmp_path / "logs/a_1.log", losses=CONVERGING[:2], submission_org="unofficial")
    (tmp_path / "logs/b_1.log").write_text("\n".join(run_lines(seed=2)[:20]))
    (tmp_path / "logs/c_1.log").write_text(":::MLLOG {broken\n")
    done = summarize(tmp_path / "logs", "--html", tmp_path / "page.html")
    assert done.status == 1
    dom = rendered(tmp_path / "page.html", tmp_path)
    seen = report(dom)
    assert seen["rows"] == 3
    assert seen["findings"] > 10
    for words in ("not converged", "unofficial", "c_1.log:1", "compliance checker"):
        assert words in dom
    assert seen["verdict"].startswith("3 runs, rules 5.1.0: NOT all")
    assert all(chart["outside"] == 0 for chart in seen["charts"])


def test_page_of_a_round_in_a_browser(summarize: Callable[..., Done], tmp_path: Path) -> None:
    """Twelve systems: a table by score with links, no chart below it before that, the findings last."""
    for number in range(12):
        folder = tmp_path / f"round/results/system_{number:02}/llama2_70b_lora"
        losses = (*CONVERGING[:-1], *([0.9255] * (number % 4)), 0.924)
        for trial in range(10):
            write_run(folder / f"result_{trial}.txt", seed=trial, losses=losses, lora_alpha=16 if number == 3 else 32)
    summarize(tmp_path / "round", "--html", tmp_path / "page.html")
    seen = report(rendered(tmp_path / "page.html", tmp_path))
    names = [name for name, _ in seen["links"]]
    assert len(names) == 12
    assert all(there for _, there in seen["links"])
    assert "system_00" in names[0]  # the fastest; those with three evaluations more come last
    assert "system_11" in names[-1]
    assert seen["firstChart"] < 900
    assert seen["findingsTop"] > seen["lastChart"]
    assert seen["height"] < 12 * 700 + 900
    assert seen["wide"] <= 0


def test_page_on_a_phone(summarize: Callable[..., Done], ten: Path, tmp_path: Path) -> None:
    summarize(ten, "--html", tmp_path / "page.html")
    seen = report(rendered(tmp_path / "page.html", tmp_path, width=390))
    assert seen["wide"] <= 0
    assert seen["smallest"] >= 10  # pixels
    assert all(chart["outside"] == 0 for chart in seen["charts"])


def test_page_on_paper(summarize: Callable[..., Done], ten: Path, tmp_path: Path) -> None:
    """One system is one or two sheets, whatever the reader's colours are."""
    summarize(ten, "--html", tmp_path / "page.html")
    command = [browser(), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile"]
    command += [f"--print-to-pdf={tmp_path}/page.pdf", (tmp_path / "page.html").as_uri()]
    subprocess.run(command, capture_output=True, timeout=60, check=True)
    assert 1 <= len(re.findall(rb"/Type\s*/Page\b", (tmp_path / "page.pdf").read_bytes())) <= 2


def test_page_names_the_system(summarize: Callable[..., Done], tmp_path: Path) -> None:
    tree = tmp_path / "Cobalt"
    write_run(tree / "results/box/llama2_70b_lora/result_0.txt")
    (tree / "systems").mkdir()
    described = {
        "number_of_nodes": 1,
        "accelerators_per_node": 8,
        "accelerator_model_name": "H100",
        "system_name": "Box of eight",
    }
    (tree / "systems/box.json").write_text(json.dumps(described))
    summarize(tree, "--html", tmp_path / "page.html")
    seen = report(rendered(tmp_path / "page.html", tmp_path))
    assert (seen["title"], seen["heading"]) == ("Box of eight", "Box of eight")


def test_page_of_a_rehearsal_has_no_empty_columns(summarize: Callable[..., Done], tmp_path: Path) -> None:
    write_run(tmp_path / "logs/a_1.log", submission_platform="CPU rehearsal, not a submission")
    summarize(tmp_path / "logs", "--html", tmp_path / "page.html")
    seen = report(rendered(tmp_path / "page.html", tmp_path))
    assert "MFU" not in seen["headings"]
    assert "vs published" not in seen["headings"]
    assert "minutes" in seen["headings"]
    assert seen["bands"] == 0


def test_cost(summarize: Callable[..., Done], ten: Path) -> None:
    """Ten runs of 1,736 s and 60 s of init on eight GPUs: 39.91 GPU-hours; at 700 W 27.9 kWh."""
    done = summarize(ten, "--gpu-hour-price", "2.5", "--gpu-watts", "700")
    assert "cost: 39.9 GPU-hours, 99.78 in money, 27.9 kWh for 10 runs" in done.stdout
    found = json.loads(summarize(ten, "--json", "--gpu-hour-price", "2.5").stdout)["results"][0]["cost"]
    assert found["gpu_hours"] == pytest.approx(10 * 8 * 1796 / 3600)
    assert found["money"] == pytest.approx(2.5 * found["gpu_hours"])
    assert found["energy_kwh"] is None


# ---- Watching --------------------------------------------------------------------------------------------------------


def test_watch_follows_a_job_to_its_end(tmp_path: Path) -> None:
    """Two trials: the first is there, the second grows while the command watches."""
    for trial in (1, 2):
        (tmp_path / f"a_{trial}.env").write_text("NEXP=2\n")
    write_run(tmp_path / "a_1.log")
    lines = run_lines(seed=2)
    second = tmp_path / "a_2.log"
    second.write_text("\n".join(lines[:45]) + "\n" + lines[45][:30])  # a line that is being written
    command = [sys.executable, script.__file__, str(tmp_path), "--watch", "0.2", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        time.sleep(2)
        assert process.poll() is None
        second.write_text("\n".join(lines) + "\n")
        out, err = process.communicate(timeout=30)
    assert process.returncode == 0
    assert len(json.loads(out)["results"][0]["runs"]) == 2
    assert "a_2.log: converged" in err


@pytest.mark.parametrize(
    "end",
    [
        "slurmstepd: error: *** JOB 77 ON n1 CANCELLED AT 2026-11-24T10:00:00 DUE TO TIME LIMIT ***",
        "run.sub: trial 1 finished with status 137: training FAILED (137), compliance passed",
        "+ echo 'RUNANDTIME_STOP 1745262466'",
    ],
)
def test_watch_ends_when_the_job_was_killed(tmp_path: Path, end: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a_1.env").write_text("NEXP=10\n")
    (tmp_path / "a_1.log").write_text("\n".join([*run_lines()[:60], end]) + "\n")
    started = time.monotonic()
    assert script.main([str(tmp_path), "--watch", "0.2", "--json"]) == 1
    assert time.monotonic() - started < 20
    found = json.loads(capsys.readouterr().out)["findings"]
    assert "job ended" in [finding["code"] for finding in found]


def test_watch_ends_when_nothing_was_written_for_long(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Half an hour, the longest initialization that the rules allow."""
    log = tmp_path / "a_1.log"
    log.write_text("\n".join(run_lines()[:60]) + "\n")
    os.utime(log, (time.time() - 1900, time.time() - 1900))
    assert script.main([str(tmp_path), "--watch", "0.2", "--json"]) == 1
    assert "nothing was written for 32 minutes" in capsys.readouterr().out


def test_watch_asks_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A job that squeue does not know has ended; one that it knows goes on."""
    squeue = tmp_path / "bin/squeue"
    squeue.parent.mkdir()
    squeue.write_text("#!/bin/sh\necho 'slurm_load_jobs error: Invalid job id specified' >&2\nexit 1\n")
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", f"{squeue.parent}:{os.environ['PATH']}")
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs/241124101010_77_1.log").write_text("\n".join(run_lines()[:60]) + "\n")
    assert script.main([str(tmp_path / "logs"), "--watch", "0.2", "--json"]) == 1
    assert "Slurm has no such job" in capsys.readouterr().out


def test_progress_of_a_run(tmp_path: Path) -> None:
    """1,728 sequences in 216 steps of 4 s and an evaluation of 40 s; the second evaluation is due at 1,920, 96 s later."""
    from llama2_lora.judge.report import progress_line
    from llama2_lora.judge.run import Run
    from llama2_lora.judge.runlog import read_log

    lines = run_lines()
    end = next(i for i, x in enumerate(lines) if '"samples_count": 1728' in x) + 1
    (tmp_path / "a.log").write_text("\n".join(lines[:end]))
    assert progress_line(Run(read_log(tmp_path / "a.log"))) == (
        "a.log: 1,728 sequences in 15.1 min, 2.00 sequences/s, train loss 1.3000, "
        "evaluation 0.9400 at 1,536, next at 1,920 in 1.6 min"
    )
