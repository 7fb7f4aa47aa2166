"""What DRY_RUN=1 shows of run.sub and run_docker.sh: every command, nothing done. Needs no Slurm."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from llama2_lora.config import rules, settings

ROOT = Path(__file__).resolve().parents[2]
PATHS = {"DATADIR": "/my data", "MODEL": "/model", "LOGDIR": "/nowhere/logs", "CONT": "/images/x.sqsh"}


def dry_run(line: str, **changes: str) -> subprocess.CompletedProcess[str]:
    variables = {"PATH": os.environ["PATH"], "HOME": "/tmp", "DRY_RUN": "1", "NEXP": "2"} | PATHS | changes
    environment = {name: value for name, value in variables.items() if value}
    return subprocess.run(["bash", "-c", line], cwd=ROOT, env=environment, capture_output=True, text=True)


def commands(line: str, **changes: str) -> list[list[str]]:
    done = dry_run(line, **changes)
    assert done.returncode == 0, done.stderr
    programs = ("srun", "sbatch", "scancel", "docker", "podman", "python", "bash")
    lines = re.findall(rf"^(?:{'|'.join(programs)}) .*", re.sub(r"\n(?=    else sudo)", " ", done.stdout), flags=re.M)
    return [shlex.split(line) for line in lines]


def named_variables(line: str, **changes: str) -> set[str]:
    """All that a task is given, from the one line that says so."""
    (named,) = re.findall(r"^VARIABLES='(.*)'$", dry_run(line, **changes).stdout, flags=re.M)
    return set(re.findall(r"[A-Z][A-Z0-9_]+", named))


def training(found: list[list[str]]) -> list[list[str]]:
    return [words for words in found if words[-1] == "scripts/run_and_time.sh"]


SLURM = "source config_DGXH100_8x8x2.sh && bash run.sub"
DOCKER = "scripts/run_docker.sh config_DGXH100_1x8x4.sh"


def test_the_steps_in_order():
    steps = [
        "sbatch",
        "--container-image=/images/x.sqsh",
        "scripts/preflight.py",
        "probe",
        "judge",
        "scripts/lib/allreduce_bench.py",
    ]
    steps += (
        ["--allreduce"] + ["drop_caches", "scripts/run_and_time.sh", "mlperf_logging.compliance_checker"] + ["enroot remove"]
    )
    found = iter(commands(SLURM))
    for step in steps:
        assert any(step in word for words in found for word in words), step


def test_a_rehearsal_is_a_check_that_a_job_may_ask_for():
    """Once, on the first node, before the trials; without the job's own settings, since it has a config of its own."""
    found = commands(SLURM, REHEARSE="1")
    (rehearsal,) = (words for words in found if "scripts/rehearse.sh" in words)
    assert rehearsal[-2:] == ["scripts/rehearse.sh", "--gpu"]
    assert {"--nodes=1", "--relative=0", "REHEARSAL_DIR=/results/rehearsal"} <= set(rehearsal)
    assert {"--unset=LR", "--unset=TP", "--unset=CONFIG_FILE", "--unset=REHEARSE", "--unset=NEXP"} <= set(rehearsal)
    assert {"--unset=VBOOST", "--unset=GPU_CLOCKS"} <= set(rehearsal), "it would put them back before the trials"
    assert found.index(rehearsal) < found.index(training(found)[0])
    assert not any("scripts/rehearse.sh" in words for words in commands(SLURM))


def test_ranks_and_container_of_a_training():
    (first,) = training(commands(SLURM))
    for word in ("--nodes=8", "--ntasks=64", "--ntasks-per-node=8", "--kill-on-bad-exit=1", "--label"):
        assert word in first
    (mounts,) = (word for word in first if word.startswith("--container-mounts="))
    assert mounts.partition("=")[2].split(",")[:3] == ["/my data:/data:ro", "/model:/ckpt:ro", "/nowhere/logs:/results:rw"]
    assert "$VARIABLES" in first, "the names of 90 variables are shown once"
    listed = named_variables(SLURM)
    assert {"LR", "SEED", "MASTER_PORT", "DATA_PATH", "NCCL_NVLS_ENABLE", "PYTORCH_CUDA_ALLOC_CONF"} < listed
    assert not {"PATH", "HOME", "LD_LIBRARY_PATH", "CONT_MOUNTS"} & listed


def test_all_that_settings_read_is_the_jobs_and_not_the_images():
    """Set in the job or not: a name that is not listed would have the image's value."""
    sites = {"NCCL_IB_HCA", "SHARP_COLL_LOG_LEVEL"}
    listed = named_variables(SLURM, MYTHING="1", RANK="1", **dict.fromkeys(sites, "1"))
    assert settings.variables() | sites | {"PYTHON", "MASTER_ADDR", "BIND"} <= listed
    assert "MYTHING" not in listed


@pytest.mark.parametrize("config", sorted(path.name for path in ROOT.glob("config_*x*x*.sh")))
def test_all_that_a_config_exports_reaches_the_training(config):
    exported = dry_run(f"source {config} && env").stdout.split("\n")
    names = {line.partition("=")[0] for line in exported if "=" in line} - {
        *PATHS,
        "DRY_RUN",
        "PATH",
        "HOME",
        "PWD",
        "SHLVL",
        "_",
    }
    assert names <= named_variables(f"source {config} && bash run.sub", NCCL_TEST="0")


def test_without_containers():
    found = commands(SLURM, CONT="none")
    assert not any("container" in word or "enroot" in word for words in found for word in words)
    assert f"--chdir={ROOT}" in training(found)[0]


@pytest.mark.parametrize(("docker", "gpus"), [("docker", ["--gpus", "all"]), ("podman", ["--device", "nvidia.com/gpu=all"])])
def test_one_node_without_slurm(docker, gpus):
    found = commands(DOCKER, DOCKER=docker)
    create = found[0]
    assert create[:2] == [docker, "run"]
    at = create.index(gpus[0])
    assert create[at : at + 2] == gpus
    assert create[create.index("/my data:/data:ro") - 1] == "--volume"
    assert "--stop-signal=KILL" in create
    assert create[-3:] == ["/images/x.sqsh", "sleep", "infinity"]
    name = create[create.index("--name") + 1]
    for words in training(found):
        assert words[:2] == [docker, "exec"]
        torchrun = ["python", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=8", "--no-python"]
        assert words[words.index(name) + 1 : -1] == torchrun
        assert "$VARIABLES" in words
    assert {"SEED", "LR"} <= named_variables(DOCKER, DOCKER=docker)
    assert found[-1] == [docker, "rm", "--force", name]
    assert not any(words[0] == "srun" for words in found)


def test_one_node_below_salloc_is_still_the_callers():
    """Slurm's variables are then those of a shell, and its folder not that of the call."""
    (create, *_) = commands(DOCKER, DOCKER="docker", DATADIR="data", SLURM_JOB_ID="1", SLURM_SUBMIT_DIR="/nowhere")
    assert f"{ROOT}/data:/data:ro" in create
    assert f"{ROOT}:/workspace/ft-llm:ro" in create


def test_one_trial_stands_for_all():
    text = dry_run(SLURM, NEXP="10", SEED="7").stdout
    assert "trial 1 of 10: seed 7" in text
    assert "run.sub: and 9 more\n" in text
    assert "more" not in dry_run(SLURM, NEXP="1").stdout


def test_a_config_without_nexp_makes_a_result():
    assert f"trial 1 of {rules.RUNS_PER_RESULT}:" in dry_run(SLURM, NEXP="").stdout


def test_what_is_booked_for_the_job_s_end_is_called_off_by_name():
    """Outside a job neither node nor booking is known."""
    found = commands(SLURM)
    (booked,) = (words for words in found if words[0] == "sbatch")
    assert booked[-1] == "--nodelist=NODE"
    assert found[-1] == ["scancel", "--quiet", "CLEANUP_JOB"]
    assert not any(words[0] in ("sbatch", "scancel") for words in commands(SLURM, CONT="none"))


def test_clocks_are_set_before_the_trials_and_put_back_at_the_end():
    found = commands(SLURM, VBOOST="1", GPU_CLOCKS="1200,1980", CONT="none")
    (booked,) = (words for words in found if words[0] == "sbatch")
    assert "gpu_clocks.sh restore /nowhere/logs/.gpu_clocks_" in " ".join(booked)
    on_nodes = [words for words in found if words[0] == "srun" and any(w.endswith("gpu_clocks.sh") for w in words)]
    set_, restore = on_nodes
    assert set_[set_.index("set") + 2 :] == ["1", "1200,1980"]
    assert restore[-2] == "restore"
    assert found.index(set_) < found.index(training(found)[0]) < found.index(restore)
    assert {"--nodes=8", "--ntasks-per-node=1", "--kill-on-bad-exit=0"} <= set(set_)
    assert not any("gpu_clocks" in word for words in commands(SLURM) for word in words)


@pytest.mark.parametrize(
    ("changes", "asks"),
    [({"SLURM_GPUS_ON_NODE": "8", "VBOOST": "1"}, True), ({"SLURM_GPUS_ON_NODE": "8"}, False), ({"VBOOST": "1"}, False)],
)
def test_a_booked_job_asks_for_the_gpus_whose_clocks_it_puts_back(changes, asks):
    """Only then: without GPUs as Slurm's resource sbatch refuses it, and a container is removed without one."""
    (booked,) = (words for words in commands(SLURM, **changes) if words[0] == "sbatch")
    assert ("--gpus-per-node=8" in booked) == asks
    assert not any("/dev/null" in word for word in booked)


def test_the_config_is_checked():
    done = dry_run(SLURM)
    assert "DGXH100_8x8x2: go" in done.stdout
    assert "of nodes, files, mounts and image nothing was checked" in done.stdout
    done = dry_run("source config_DGXH100_8x8x2.sh && export LORA_RANK=8 && bash run.sub")
    assert done.returncode == 1
    assert "LORA_RANK=8: is fixed by the closed division" in done.stdout
    assert "preflight says no" in done.stderr


def test_a_config_that_could_not_be_checked_is_told(tmp_path):
    """A login node whose Python is too old, or has no packages."""
    (tmp_path / "python3").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "python3").chmod(0o755)
    done = dry_run(SLURM, PATH=f"{tmp_path}:/usr/bin:/bin", PYTHON="/nowhere/python")
    assert done.returncode == 0, done.stderr
    assert "the config was NOT checked: no Python 3.11 with requirements-light.txt here" in done.stdout


def test_seeds_are_drawn_anew():
    lines = [line for _ in range(2) for line in dry_run(SLURM).stdout.splitlines() if ": seed " in line]
    assert len(lines) == len(set(lines)) == 2


def test_nothing_is_written():
    before = set(ROOT.iterdir())
    assert dry_run(SLURM).returncode == 0
    assert not Path(PATHS["LOGDIR"]).exists()
    assert set(ROOT.iterdir()) == before


@pytest.mark.parametrize(
    ("line", "changes", "problems"),
    [
        (
            "bash run.sub",
            dict.fromkeys((*PATHS, "NEXP"), ""),
            [
                "CONT DATADIR MODEL LOGDIR: not set: export them",
                "DGXSYSTEM DGXNNODES DGXNGPU NEXP: not set: source a config_*.sh",
            ],
        ),
        (SLURM, {"DATADIR": "/a:b", "HEALTH": "on"}, ["DATADIR=/a:b: a colon or comma", "HEALTH=on: must be one of"]),
        (SLURM, {"DRY_RUN": "yes", "REHEARSE": "on"}, ["DRY_RUN=yes: must be one of 0 1", "REHEARSE=on: must be one of 0 1"]),
        (SLURM, {"NEXP": "0"}, ["NEXP=0: must be a whole number, at least 1"]),
        (SLURM, {"NEXP": "x", "BIND": "cpu"}, ["NEXP=x: must be a whole number", "BIND=cpu: must be one of gpu none"]),
        (
            SLURM,
            {"VBOOST": "max", "GPU_CLOCKS": "fast"},
            ["VBOOST=max: must be a whole number", "GPU_CLOCKS=fast: must be MHz"],
        ),
        (SLURM, {"SLURM_JOB_NUM_NODES": "4"}, ['the job has 4 nodes; submit with sbatch -N "$DGXNNODES"']),
        ("scripts/run_docker.sh config_DGXH100_8x8x2.sh", {}, ["DGXNNODES=8: must be 1 without Slurm"]),
        ("scripts/run_docker.sh nowhere.sh", {}, ["usage:", "nowhere.sh is no file"]),
    ],
)
def test_wrong_use_names_every_problem(line, changes, problems):
    done = dry_run(line, **changes)
    assert done.returncode == 2
    for problem in problems:
        assert problem in done.stderr
