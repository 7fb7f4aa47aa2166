"""preflight.py as a command: on the shipped configs, on broken ones, and in an environment."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import rich  # noqa: F401  preflight.py prints with it: without it there is nothing to test here

from helpers import ROOT
from helpers.training_runs import Tiny, clean_environment
from llama2_lora.config.settings import Settings
from llama2_lora.forecast.plan import layout

H100 = ROOT / "config_DGXH100_1x8x4.sh"
Run = subprocess.CompletedProcess[str]


def preflight(*arguments: str | Path, **variables: str) -> Run:
    command = [sys.executable, str(ROOT / "scripts" / "preflight.py"), *map(str, arguments)]
    return subprocess.run(command, env=clean_environment(**variables), capture_output=True, text=True, timeout=60)


def values(*arguments: str | Path, **variables: str) -> dict:
    return json.loads(preflight(*arguments, "--json", **variables).stdout)


@pytest.fixture
def changed(tmp_path: Path) -> Callable[..., Path]:
    """The 1x8x4 config with other variables."""

    def write(**variables: str) -> Path:
        path = tmp_path / f"config_{variables.get('DGXSYSTEM', 'DGXH100_1x8x4')}.sh"
        lines = [f"export {name}={value}" for name, value in variables.items()]
        path.write_text("\n".join([f"source {H100}", *lines]) + "\n")
        return path

    return write


def levels(found: dict, level: str) -> list[str]:
    return [finding["text"] for finding in found["findings"] if finding["level"] == level]


@pytest.mark.parametrize("config", sorted(ROOT.glob("config_*x*x*.sh")), ids=lambda path: path.name)
def test_every_shipped_config_is_a_go_and_fits(config: Path) -> None:
    done = preflight(config)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].startswith(f"{config.stem.removeprefix('config_')}: go")
    small = config.name.startswith(("config_CPU", "config_GPU"))
    assert re.findall(r"^ *total .* of [\d.]+: (\w+)$", done.stdout, flags=re.M) == ([] if small else ["fits"])


def test_a_submitter_exported_before_is_known() -> None:
    """In the README's order: export who submits, then check the config, which only has defaults for it."""
    assert "MLPERF_SUBMITTER" in preflight(H100).stdout
    exported = {"MLPERF_SUBMITTER": "Cobalt", "MLPERF_SYSTEM_NAME": "8xH100", "MLPERF_STATUS": "onprem"}
    assert preflight(H100, **exported).stdout.splitlines()[-1] == "DGXH100_1x8x4: go"


def test_shipped_h100_config_by_hand() -> None:
    """GBS 8: first evaluation (3 + 1) * 48 = 192, then every 48; cosine at 400 of 800 is half; mean 3,179 / 8 = 397."""
    found = values(H100)
    assert found["batch"]["global_batch_size"] == 8
    assert found["batch"]["gradient_accumulation_steps"] == 4
    assert found["evaluation"]["steps"][:3] == [192, 240, 288]
    assert found["evaluation"]["sequences"][:3] == [1536, 1920, 2304]
    assert dict(found["learning_rate"]["points"])[400] == pytest.approx(2e-4)
    assert found["expected_steps"] == pytest.approx(397.3, abs=0.1)
    assert found["convergence"]["bound"] == pytest.approx(2960.6, abs=0.1)
    assert found["forecast"]["run_minutes"]["low"] < 27.5 < found["forecast"]["run_minutes"]["high"]
    assert found["forecast"]["walltime_minutes"] == 480
    assert found["memory"]["capacity_gb"] == pytest.approx(85.5, abs=0.1)
    assert sum(item["gb"] for item in found["memory"]["items"]) == pytest.approx(found["memory"]["total_gb"])
    assert {rule["level"] for rule in found["rules"]} == {"ok"}


@pytest.mark.parametrize(
    ("changes", "groups"),
    [
        # one node of 8: TP4 DP2
        ({}, {"TP": ([0, 1, 2, 3], True), "CP": ([0], True), "DP": ([0, 4], True), "PP": ([0], True)}),
        # two nodes of 4, TP2 CP2 DP2: CP pairs 0 and 2, DP pairs 0 and 4, on the other node
        (
            {"DGXNNODES": "2", "DGXNGPU": "4", "TP": "2", "CP": "2", "DGXSYSTEM": "DGXH100_2x4x4"},
            {"TP": ([0, 1], True), "CP": ([0, 2], True), "DP": ([0, 4], False), "PP": ([0], True)},
        ),
        # CP8 over two nodes of 4, as in a rack of GB200
        (
            {"DGXNNODES": "2", "DGXNGPU": "4", "TP": "1", "CP": "8", "SP": "0", "TP_COMM_OVERLAP": "0"}
            | {"DGXSYSTEM": "DGXGB200_2x4x4"},
            {"TP": ([0], True), "CP": ([0, 1, 2, 3, 4, 5, 6, 7], False), "DP": ([0], True), "PP": ([0], True)},
        ),
        # PP is the outermost: stage 0 holds ranks 0 to 3
        (
            {"TP": "2", "PP": "2", "DGXSYSTEM": "DGXH100_1x8x4"},
            {"TP": ([0, 1], True), "CP": ([0], True), "DP": ([0, 2], True), "PP": ([0, 4], True)},
        ),
    ],
)
def test_rank_grid(changes: dict[str, str], groups: dict[str, tuple[list[int], bool]]) -> None:
    env = {"DGXSYSTEM": "DGXH100_1x8x4", "DGXNNODES": "1", "DGXNGPU": "8", "TP": "4", "SP": "1"}
    env |= {"MINIBS": "4", "LR": "4e-4", "MAX_STEPS": "800"} | changes
    rows = layout(Settings.from_env(env))
    assert {row.group: (list(row.ranks), row.within_a_node) for row in rows} == groups


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"TP": "3"}, "TP=3"),  # settings refuse it
        ({"LORA_RANK": "8", "MAX_SEQLEN": "4096"}, "LORA_RANK=8"),
        ({"TP": "1", "SP": "0", "TP_COMM_OVERLAP": "0"}, "does not fit"),
        ({"MAX_STEPS": "100"}, "must be at least 192, the step of the first evaluation"),
        ({"VAL_MBS": "64", "TP_COMM_OVERLAP": "0"}, "VAL_MBS=1 would make room"),
        ({"PP": "3", "DGXNNODES": "3", "DGXSYSTEM": "DGXH100_3x8x4"}, "PP=3: must divide the model's 80 layers"),
        ({"SEED": "7"}, "seed: 7 for all 10 runs"),
        ({"WALLTIME": "20"}, "WALLTIME=20"),
        ({"FP8": "0", "FP8_DPA": "0", "FP8_PARAMS": "0", "FP8_ACT": "0", "FP4": "1"}, "H100 has no NVFP4 units"),
        ({"FP8_PARAM": "1"}, "FP8_PARAM: nothing reads it; is FP8_PARAMS meant?"),
        ({"LRATE": "1e-3"}, "LRATE: nothing reads it"),
        ({"LORA_TARGETS": "all"}, "LORA_TARGETS: nothing reads it"),
    ],
)
def test_no_go(changed: Callable[..., Path], changes: dict[str, str], expected: str) -> None:
    done = preflight(changed(**changes))
    assert done.returncode == 1
    assert expected in done.stdout
    assert ": no-go, " in done.stdout.splitlines()[-1]
    assert not done.stderr


def test_all_illegal_settings_are_named_together(changed: Callable[..., Path]) -> None:
    found = values(changed(LORA_RANK="8", MAX_SEQLEN="4096", WALLTIME="soon"))
    assert found["go"] is False
    assert [text.split(":")[0] for text in levels(found, "error")] == ["WALLTIME=soon", "MAX_SEQLEN=4096", "LORA_RANK=8"]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"WALLTIME": "120"}, "10 runs are expected to take"),
        ({"NEXP": "3"}, "runs: 3"),
        ({"MAX_STEPS": "420"}, "some runs"),
        ({"MLPERF_DIVISION": "open", "LORA_RANK": "8"}, "fixed hyperparameters: LORA_RANK"),
        ({"MLPERF_DIVISION": "open", "EVAL_SKIP": "0"}, "evaluations skipped: 0"),
        ({"ACCELERATOR": "", "DGXSYSTEM": "XE9680_1x8x4"}, "the GPU is not known"),
        ({"DGXNNODES": "72", "DGXSYSTEM": "DGXH100_72x8x4"}, "GBS 576"),
        ({"ACCELERATOR": "B200", "TP": "1", "SP": "0", "TP_COMM_OVERLAP": "0", "FP8_ACT": "0"}, "FP8_ACT=1"),
        ({"VAL_MBS": "25", "TP_COMM_OVERLAP": "0"}, "tight"),
        ({"MY_SITE": "1"}, "MY_SITE: nothing reads it"),
    ],
)
def test_warnings_do_not_stop_a_run(changed: Callable[..., Path], changes: dict[str, str], expected: str) -> None:
    done = preflight(changed(**changes))
    assert done.returncode == 0, done.stdout
    assert any(expected in line for line in done.stdout.splitlines() if line.startswith("warning: "))


def test_a_warning_is_counted_beside_go(changed: Callable[..., Path]) -> None:
    """What a site sees first: ten closed runs that could not be submitted, since nothing says whose they are."""
    done = preflight(H100)
    assert "MLPERF_SUBMITTER and MLPERF_SYSTEM_NAME: not set" in done.stdout
    assert done.stdout.splitlines()[-1] == "DGXH100_1x8x4: go, 1 warning"
    named = changed(MLPERF_SUBMITTER="Site", MLPERF_SYSTEM_NAME="dgxh100_n1")
    done = preflight(named)
    assert "MLPERF_STATUS=research: results would be listed as Research, Development, or Internal" in done.stdout
    assert done.stdout.splitlines()[-1] == "DGXH100_1x8x4: go, 1 warning"
    named = changed(MLPERF_SUBMITTER="Site", MLPERF_SYSTEM_NAME="dgxh100_n1", MLPERF_STATUS="cloud")
    assert preflight(named).stdout.splitlines()[-1] == "DGXH100_1x8x4: go"


def test_one_trial_needs_no_submitter(changed: Callable[..., Path]) -> None:
    assert "MLPERF_SUBMITTER" not in preflight(changed(NEXP="1")).stdout


def test_a_misspelt_variable_of_the_shell_is_a_warning() -> None:
    """It may be somebody else's; in a config it is an error."""
    done = preflight(**exported(), FP8_PARAM="1")
    assert done.returncode == 0
    assert "warning: FP8_PARAM: nothing reads it; is FP8_PARAMS meant?" in done.stdout


def test_a_systems_name_without_the_files() -> None:
    done = preflight(ROOT / "DGXH100_1x8x4")
    assert done.returncode == 2
    assert f"DGXH100_1x8x4: no such file; is {H100} meant?" in done.stderr


def test_only_configs_are_sourced(tmp_path: Path) -> None:
    """Sourcing runs a file, whatever it is: another name must not be enough."""
    other = tmp_path / "README.md"
    other.write_text(f"touch {tmp_path}/ran\n")
    done = preflight(other)
    assert done.returncode == 2
    assert "must be a config_*.sh" in done.stderr
    assert not (tmp_path / "ran").exists()


def test_an_unknown_picture_format_is_wrong_usage(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    done = preflight(H100, "--plot", tmp_path / "x.foo")
    assert done.returncode == 2
    assert "x.foo" in done.stderr
    assert "Traceback" not in done.stderr


def exported() -> dict[str, str]:
    """What `source CONFIG` leaves in a shell."""
    text = subprocess.run(["bash", "-c", f"source {H100}; env -0"], capture_output=True, text=True).stdout
    found = dict(item.split("=", 1) for item in text.split("\0") if item)
    return {name: value for name, value in found.items() if name not in ("PATH", "HOME")}


def test_environment_and_config_say_the_same() -> None:
    assert values(**exported()) == values(H100)


def test_a_config_is_sourced_without_what_the_shell_holds() -> None:
    assert values(H100, TP="8", MAX_STEPS="1") == values(H100)


def test_cpu_rehearsal_has_no_memory_and_no_rules() -> None:
    config = ROOT / "config_CPU_1x2x4.sh"
    found = values(config)
    assert found["memory"] is found["forecast"] is found["convergence"] is None
    assert found["rules"] == found["findings"] == []
    assert "CPU rehearsal" in preflight(config).stdout


def test_wrong_usage(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    broken = tmp_path / "config_BROKEN.sh"
    broken.write_text("source /nowhere/config_common.sh || exit 1\n")
    unwritable = preflight(H100, "--plot", tmp_path / "no folder" / "plot.png")
    for done in (preflight(tmp_path / "absent.sh"), preflight(broken), preflight("--nonsense"), unwritable):
        assert done.returncode == 2, done
        assert "error: " in done.stderr
        assert "Traceback" not in done.stderr


def test_nothing_set_is_a_no_go() -> None:
    done = preflight()
    assert done.returncode == 1
    assert "DGXSYSTEM: is not set" in done.stdout


def test_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert preflight(H100, "--plot", tmp_path / "plot.svg").returncode == 0
    text = (tmp_path / "plot.svg").read_text()
    assert text.lstrip().startswith("<?xml")
    assert len(text) > 10_000


def test_start_up_needs_no_heavy_library() -> None:
    """A login node's answer in half a second: importtime names what was loaded; the clock of a test machine says nothing."""
    command = [sys.executable, "-X", "importtime", ROOT / "scripts" / "preflight.py", H100]
    done = subprocess.run(command, env=clean_environment(), capture_output=True, text=True)
    loaded = {line.rsplit("|", 1)[1].strip().split(".")[0] for line in done.stderr.splitlines() if "|" in line}
    assert loaded.isdisjoint({"torch", "numpy", "matplotlib", "lightning", "nemo", "megatron", "mlperf_logging", "yaml"})


# ---- --inside --------------------------------------------------------------------------------------------------------


@pytest.fixture
def inside(tiny: Tiny, tmp_path: Path) -> Callable[..., dict]:
    def run(**changes: str) -> dict:
        return values("--inside", **(tiny.environment(tmp_path) | {"MAX_STEPS": "40"} | changes))

    return run


def failed(found: dict) -> list[str]:
    return [check["text"] for check in found["inside"] if check["level"] == "error"]


def test_inside_of_a_good_node(inside: Callable[..., dict]) -> None:
    found = inside()
    assert found["go"]
    assert not failed(found)
    assert [check["code"] for check in found["inside"]] == ["paths", "data", "data", "checkpoint"]
    assert "40 rows" in found["inside"][1]["text"]


def test_inside_finds_a_changed_byte(inside: Callable[..., dict], tiny: Tiny, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for file in tiny.data.iterdir():
        (data / file.name).write_bytes(file.read_bytes())
    content = bytearray((data / "train.npy").read_bytes())
    content[-1] ^= 1
    (data / "train.npy").write_bytes(content)
    found = inside(DATA_PATH=str(data))
    assert not found["go"]
    assert len(failed(found)) == 1
    assert "sha256" in failed(found)[0]
    (data / "train.npy").write_bytes(content[:-1])
    assert "the manifest says" in failed(inside(DATA_PATH=str(data)))[0]


def test_inside_names_all_that_is_missing(inside: Callable[..., dict]) -> None:
    found = inside(DATA_PATH="/nowhere/data", CKPT_PATH="/nowhere/model", RESULTS_PATH="/nowhere/results")
    text = "\n".join(failed(found))
    for name in ("train.npy", "validation.npy", "CKPT_PATH", "RESULTS_PATH"):
        assert name in text
    assert not found["go"]


def test_inside_counts_the_gpus(tmp_path: Path, tiny: Tiny) -> None:
    """An nvidia-smi of our own with 7 H100 of 40 GB: two things are wrong on this node, besides its tiny model and data."""
    gpu = "<gpu><product_name>NVIDIA H100</product_name><fb_memory_usage><total>40960 MiB</total></fb_memory_usage></gpu>"
    smi = tmp_path / "bin" / "nvidia-smi"
    smi.parent.mkdir()
    smi.write_text(f"#!/bin/sh\necho '<nvidia_smi_log><driver_version>580.1</driver_version>{gpu * 7}</nvidia_smi_log>'\n")
    smi.chmod(0o755)
    exports = subprocess.run(["bash", "-c", f"source {H100}; env -0"], capture_output=True, text=True).stdout
    variables = dict(item.split("=", 1) for item in exports.split("\0") if item)
    variables |= {"DATA_PATH": str(tiny.data), "CKPT_PATH": str(tiny.checkpoint), "RESULTS_PATH": str(tmp_path)}
    found = values("--inside", **variables | {"PATH": f"{smi.parent}:/usr/bin:/bin"})
    text = "\n".join(failed(found))
    assert "7 of 8: NVIDIA H100" in text
    assert "GPU 0 has 40 GiB" in text
    assert "train.npy has 40 rows: the rules fix 3901" in text
    assert "Llama-2-70B is expected" in text


@pytest.mark.parametrize(("check", "status"), [("fail", 1), ("warn", 0)])
def test_memory_that_this_software_cannot_hold(changed: Callable[..., Path], check: str, status: int) -> None:
    """A no-go with an override that the message names."""
    half = {"TP": "2", "MINIBS": "2", "DGXSYSTEM": "DGXH100_1x8x2", "MEMORY_CHECK": check}
    done = preflight(changed(**half))
    assert re.search(r"does not fit: .*MEMORY_CHECK=warn", done.stdout)
    assert done.returncode == status


def test_a_published_layout_is_never_refused(tmp_path: Path) -> None:
    """8xB200, FP4, MINIBS 1: submissions did; here bf16 weights beside FP4's do not fit."""
    shipped = ROOT / "config_DGXB200_FP4_1x8x1.sh"
    (tmp_path / shipped.name).write_text(f"source {shipped}\nexport FP4_PARAMS=0\n")
    done = preflight(tmp_path / shipped.name)
    assert "submissions ran TP1 CP1 in FP4 on B200" in done.stdout
    assert done.returncode == 0


def test_published_layouts_are_those_of_the_table() -> None:
    from llama2_lora.forecast.advice import PUBLISHED_LAYOUTS

    with (ROOT / "benchmarks/published_results.csv").open(newline="") as file:
        found = {(row["accelerator"], row["precision"], int(row["tp"]), int(row["cp"])) for row in csv.DictReader(file)}
    stated = {(part, kind, *layout) for (part, kind), layouts in PUBLISHED_LAYOUTS.items() for layout in layouts}
    assert found <= stated
    assert stated - found == {("B300", "fp4", 1, 1)}  # v6.0


def test_cost_of_a_config() -> None:
    """GPU-hours always; money and energy where a price and a power are given."""
    done = preflight(H100, "--json", "--gpu-hour-price", "2", "--gpu-watts", "700")
    found = json.loads(done.stdout)
    gpus = found["layout"][0]["size"] * found["layout"][1]["size"] * found["layout"][2]["size"]
    run = found["cost"]["run"]
    assert run["gpu_hours"] == pytest.approx((found["forecast"]["run_minutes"]["middle"] + 3) * gpus / 60)
    assert run["money"] == pytest.approx(2 * run["gpu_hours"])
    assert run["energy_kwh"] == pytest.approx(0.7 * run["gpu_hours"])
    assert "GPU-hours" in preflight(H100).stdout
