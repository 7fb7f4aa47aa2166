"""scripts/package_submission.py: the tree, the official checkers on it, and every refusal."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from helpers import ROOT
from helpers.run_text import CONVERGING, line, load_script, write_result, write_run
from llama2_lora.judge.submission import OPTIONAL, REQUIRED

SLOWER = (*CONVERGING[:-1], 0.926, 0.924)  # 3,456 sequences: no scaling
script = load_script("package_submission")


@dataclass
class Done:
    """What the command said."""

    status: int
    errors: list[str]


@pytest.fixture
def package(capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    def run(logs: Path, *options: str) -> Done:
        """Run the command; the system description and the output lie beside the logs."""
        paths = ["--system", str(logs.parent / "box.json"), "--output", str(logs.parent / "out")]
        status = script.main([str(logs), *paths, *options])
        lines = capsys.readouterr().err.splitlines()
        return Done(status, [line.removeprefix("error: ") for line in lines if line.startswith("error: ")])

    return run


@pytest.fixture
def logs(tmp_path: Path) -> Path:
    """Ten runs of this code's config, and a complete system description."""
    answers = dict.fromkeys((*REQUIRED, *OPTIONAL), "as sold")
    known = {"submitter": "Cobalt", "division": "closed", "status": "Available on-premise", "number_of_nodes": "1"}
    (tmp_path / "box.json").write_text(json.dumps(answers | known | {"accelerators_per_node": "8"}))
    return write_result(tmp_path / "logs", losses=SLOWER)


@pytest.mark.parametrize("ruleset", ["5.1.0", "6.1.0"])
def test_tree_passes_the_official_checkers(package: Callable[..., Done], logs: Path, ruleset: str) -> None:
    """By their own commands, on what was made."""
    done = package(logs, "--ruleset", ruleset)
    assert done.status == 0, done.errors
    tree = logs.parent / "out" / "Cobalt"
    results = tree / "results/box/llama2_70b_lora"
    assert sorted(p.name for p in results.iterdir()) == sorted(f"result_{i}.txt" for i in range(10))
    assert (results / "result_9.txt").read_text() == (logs / "241124_10.log").read_text()
    implementations = tree / "benchmarks/llama2_70b_lora/implementations"
    assert (implementations / "nemo/src/train.py").read_text() == (ROOT / "src/train.py").read_text()
    assert (implementations / "nemo/config_DGXH100_1x8x4.sh").is_file()
    instructions = {"README.md", "setup.sh", "init_datasets.sh", "run_and_time.sh", "box_nemo.json"}
    assert {p.name for p in (implementations / "box").iterdir()} == instructions
    assert re.search(r"revision [0-9a-f]{7}", (implementations / "box/README.md").read_text())
    for script in (implementations / "box").glob("*.sh"):
        subprocess.run([Path(sys.executable).parent / "shellcheck", "--exclude=SC1091", script], check=True)
    said = official("package_checker", tree, "training", ruleset, cwd=logs.parent)
    assert "PACKAGE CHECKER FOUND NO ERRORS" in said
    assert "ERROR -" not in said
    assert "ALL CHECKS PASSED" in official("repo_checker", tree, "training", ruleset, cwd=logs.parent)
    assert "checker passed" in official("system_desc_checker", tree / "systems/box.json", "training", ruleset, cwd=logs.parent)


def official(name: str, *arguments: object, cwd: Path) -> str:
    command = [sys.executable, "-m", f"mlperf_logging.{name}", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=cwd)
    return done.stdout + done.stderr


def test_scripts_name_commands_that_exist(package: Callable[..., Done], logs: Path) -> None:
    """What the tree's scripts call is in the code beside them, with those options."""
    assert package(logs).status == 0
    folder = logs.parent / "out/Cobalt/benchmarks/llama2_70b_lora/implementations"
    text = "".join(p.read_text() for p in (folder / "box").glob("*.sh"))
    called = re.findall(r"(scripts/\w+\.py) (--\w+)", text)
    assert called
    for script, option in called:
        assert option in (folder / "nemo" / script).read_text()


def test_all_that_is_missing_is_listed_at_once(package: Callable[..., Done], tmp_path: Path) -> None:
    """Nothing of the system is known but what the logs say; one field is absent; the logs are too few."""
    logs = write_result(tmp_path / "logs", 9, losses=SLOWER)
    done = package(logs)
    assert done.status == 1
    system = json.loads((tmp_path / "box.json").read_text())
    known = {"submitter": "Cobalt", "division": "closed", "status": "Available on-premise", "system_name": "8xH100 box"}
    assert {name: system[name] for name in known} == known
    assert (system["number_of_nodes"], system["accelerators_per_node"]) == ("1", "8")
    del system["hw_notes"]
    (tmp_path / "box.json").write_text(json.dumps(system))
    found = package(logs).errors
    assert any(re.match(r"9 runs: a result needs exactly 10 \(§12\)", e) for e in found)
    assert any('must exist, may be "": hw_notes' in e for e in found)
    (text,) = [e for e in found if "the rules require an answer" in e]
    missing = set(text.rpartition(": ")[2].split(", "))
    assert {"cooling", "framework", "operating_system", "accelerator_model_name", "host_memory_capacity"} <= missing
    assert missing.isdisjoint(known)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seed": 2}, r"seed 2 is also 241124_1.log's.*§5.1"),
        ({"seed": None}, r"no seed is logged \(§5.1\)"),
        ({"losses": CONVERGING[:3]}, r"1 of 10 runs did not converge.*§12.*--accept-unconverged"),
        ({"opt_base_learning_rate": 0.0005}, r"mixed configs: opt_base_learning_rate is .*0.0005 in 241124_1.log.*§9.1"),
        ({"global_batch_size": 16, "first": 1920}, r"mixed configs: global_batch_size"),
        ({"submission_platform": "9xH100 box"}, r"mixed configs: submission_platform.*§2.2"),
        ({"lora_alpha": 16}, r"lora_alpha is 16; the rules fix 32 \(§9.1\)"),
        ({"first": 1152}, r"evaluation 1 came after 1152 sequences.*§9.4"),
        ({"lora_rank": None}, r"compliance checker: Required EXACTLY_ONE occurrence of 'lora_rank'"),
        ({"cache_clear": False}, r"cache_clear is false.*§6.1"),
        ({"config_filename": "config_lost.sh"}, r"config_lost.sh: the runs' config is not in this code"),
        ({"config_filename": None}, r"config_filename is not in the logs; name the runs' config with --config"),
    ],
)
def test_one_bad_run_is_refused(package: Callable[..., Done], logs: Path, changes: dict, words: str) -> None:
    write_run(logs / "241124_1.log", **({"losses": SLOWER, "seed": 1} | changes))
    done = package(logs)
    assert done.status == 1
    assert any(re.search(words, error) for error in done.errors), done.errors
    assert not (logs.parent / "out").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"submission_org": "unofficial"}, "submission_org is 'unofficial'"),
        ({"submission_platform": "CPU rehearsal, not a submission"}, "not a submission"),
        ({"losses": (0.94, 0.924)}, r"convergence against the reference \(RCP, 5.1.0\): failed"),
    ],
)
def test_bad_results_are_refused(package: Callable[..., Done], tmp_path: Path, changes: dict, words: str) -> None:
    done = package(write_result(tmp_path / "logs", **changes))
    assert done.status == 1
    assert any(re.search(words, error) for error in done.errors), done.errors


def test_eleven_runs_are_refused(package: Callable[..., Done], logs: Path) -> None:
    write_run(logs / "241124_11.log", seed=11, losses=SLOWER)
    assert "11 runs: a result needs exactly 10 (§12); take all that were run, not the best" in package(logs).errors


def test_a_first_trial_in_the_same_folder_is_named(package: Callable[..., Done], logs: Path) -> None:
    write_run(logs / "241123_1.log", seed=11, losses=SLOWER)
    (error,) = (e for e in package(logs).errors if e.startswith("11 runs"))
    assert error.endswith("; they are of 2 jobs: 241123_* (1), 241124_* (10); move one's away")


def test_a_description_in_a_folder_that_is_not_there(package: Callable[..., Done], logs: Path) -> None:
    """A misspelt path, and nothing is made for it."""
    done = package(logs, "--system", str(logs.parent / "nope/x.json"))
    assert f"--system {logs.parent}/nope/x.json: {logs.parent}/nope is no folder" in done.errors
    assert not (logs.parent / "nope").exists()


def test_in_a_pipe_what_was_written_comes_before_the_errors(logs: Path) -> None:
    command = [sys.executable, ROOT / "scripts/package_submission.py", logs, "--system", logs.parent / "new.json"]
    command += ["--output", logs.parent / "out"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120)
    assert done.stdout.startswith(f"wrote {logs.parent}/new.json"), done.stdout


@pytest.mark.parametrize(("failed", "status"), [(1, 0), (2, 1)])
def test_one_unconverged_run_can_be_accepted(package: Callable[..., Done], logs: Path, failed: int, status: int) -> None:
    for trial in range(1, failed + 1):
        write_run(logs / f"241124_{trial}.log", seed=trial, losses=CONVERGING[:3])
    done = package(logs, "--accept-unconverged")
    assert done.status == status, done.errors


def test_system_must_agree_with_the_logs(package: Callable[..., Done], logs: Path) -> None:
    system = json.loads((logs.parent / "box.json").read_text()) | {"division": "open", "accelerators_per_node": 4}
    (logs.parent / "box.json").write_text(json.dumps(system))
    found = package(logs).errors
    assert any("\"division\" is 'open', the logs say 'closed'" in e for e in found)
    assert any("\"accelerators_per_node\" is '4', the logs say '8'" in e for e in found)


def described(folder: Path, name: str, **changes: str) -> Path:
    """A copy of box.json under another name."""
    path = folder / f"{name}.json"
    path.write_text(json.dumps(json.loads((folder / "box.json").read_text()) | changes))
    return path


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_second_system_joins_the_tree(package: Callable[..., Done], logs: Path) -> None:
    assert package(logs).status == 0
    described(logs.parent, "crate")
    done = package(logs, "--system", str(logs.parent / "crate.json"))
    assert done.status == 0, done.errors
    tree = logs.parent / "out/Cobalt"
    assert sorted(p.name for p in (tree / "systems").iterdir()) == ["box.json", "crate.json"]
    assert len(list((tree / "results").glob("*/llama2_70b_lora/result_*.txt"))) == 20
    assert [p.name for p in tree.parent.iterdir()] == ["Cobalt"]  # no lock, no half tree
    assert "PACKAGE CHECKER FOUND NO ERRORS" in official("package_checker", tree, "training", "5.1.0", cwd=logs.parent)


def test_second_system_of_other_code_is_refused(package: Callable[..., Done], logs: Path) -> None:
    assert package(logs).status == 0
    code = logs.parent / "out/Cobalt/benchmarks/llama2_70b_lora/implementations/nemo/src/train.py"
    code.write_text("# another revision\n")
    before = snapshot(logs.parent / "out")
    described(logs.parent, "crate")
    done = package(logs, "--system", str(logs.parent / "crate.json"))
    assert any("other code than this checkout (1 files, such as src/train.py)" in e for e in done.errors)
    assert snapshot(logs.parent / "out") == before


def test_scaling_is_carried_as_the_official_checker_writes_it(package: Callable[..., Done], tmp_path: Path, logs: Path) -> None:
    done = package(write_result(tmp_path / "logs"))
    assert done.status == 0, done.errors
    scaling = json.loads((tmp_path / "out/Cobalt/results/box/llama2_70b_lora/scaling.json").read_text())
    assert scaling["scaling_factor"] == pytest.approx(1.0347, abs=1e-3)


def test_power_is_carried(package: Callable[..., Done], logs: Path) -> None:
    for trial in range(1, 11):
        meter = logs / "power" / f"241124_{trial}" / "node_0.txt"
        meter.parent.mkdir(parents=True)
        meter.write_text("\n".join([line(0, "power_measurement_start"), line(1000, "power_reading", 9000.0, host="a")]) + "\n")
    done = package(logs)
    assert done.status == 0, done.errors
    assert (logs.parent / "out/Cobalt/results/box/llama2_70b_lora/power/result_9/node_0.txt").is_file()


def test_config_of_logs_that_name_none(package: Callable[..., Done], tmp_path: Path, logs: Path) -> None:
    foreign = write_result(tmp_path / "logs", losses=SLOWER, config_filename=None)
    done = package(foreign, "--config", "config_DGXH100_1x8x4.sh")
    assert done.status == 0, done.errors
    script = tmp_path / "out/Cobalt/benchmarks/llama2_70b_lora/implementations/box/run_and_time.sh"
    assert "source config_DGXH100_1x8x4.sh" in script.read_text()


def test_submitter_in_another_script(package: Callable[..., Done], tmp_path: Path, logs: Path) -> None:
    described(tmp_path, "box", submitter="Кобальт 公司")
    done = package(write_result(tmp_path / "logs", losses=SLOWER, submission_org="Кобальт 公司"))
    assert done.status == 0, done.errors
    assert (tmp_path / "out/Кобальт_公司/systems/box.json").is_file()


def test_submitter_without_a_letter_is_refused(package: Callable[..., Done], tmp_path: Path, logs: Path) -> None:
    described(tmp_path, "box", submitter="***")
    done = package(write_result(tmp_path / "logs", losses=SLOWER, submission_org="***"))
    assert any("gives no folder name" in e for e in done.errors)
    assert not (tmp_path / "out").exists()


def test_impossible_output_is_one_line(package: Callable[..., Done], logs: Path) -> None:
    (logs.parent / "out").write_text("a file")
    done = package(logs)
    assert done.status == 1
    assert len(done.errors) == 1
    assert "out" in done.errors[0]
    assert (logs.parent / "out").read_text() == "a file"


def test_full_disk_is_one_line_and_leaves_nothing(logs: Path) -> None:
    """A limit on the size of a file stands in for the disk: the write fails half-way, with an OSError as well."""
    command = [sys.executable, ROOT / "scripts/package_submission.py", logs, "--system", logs.parent / "box.json"]
    command += ["--output", logs.parent / "deep/out"]
    limited = "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)); sys.argv = sys.argv[1:]; "
    limited += "runpy.run_path(sys.argv[0], run_name='__main__')"
    done = subprocess.run([command[0], "-c", limited, *command[1:]], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert [line for line in done.stderr.splitlines() if line.startswith("error")] == [
        f"error: --output {logs.parent}/deep/out/Cobalt: File too large"
    ]
    assert not (logs.parent / "deep").exists()


def test_what_exists_is_kept(package: Callable[..., Done], logs: Path) -> None:
    assert package(logs).status == 0
    assert any("exists" in e for e in package(logs).errors)


@pytest.mark.parametrize("text", ["{", "[]", '"x"'])
def test_bad_system_file(package: Callable[..., Done], logs: Path, text: str) -> None:
    (logs.parent / "box.json").write_text(text)
    assert any("box.json" in e for e in package(logs).errors)


def test_wrong_usage(tmp_path: Path) -> None:
    command = [sys.executable, ROOT / "scripts" / "package_submission.py", tmp_path / "nowhere"]
    done = subprocess.run([*command, "--system", "x", "--output", "y"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "nowhere: is not a folder" in done.stderr
