"""What DRY_RUN=1 shows of run.sub and run_docker.sh: every command, nothing done. Needs no Slurm."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

import pytest

from llama2_lora.config import settings

ROOT = Path(__file__).resolve().parents[2]
PATHS = {"DATADIR": "/my data", "MODEL": "/model", "LOGDIR": "/nowhere/logs", "CONT": "/images/x.sqsh"}


def dry_run(line: str, **changes: str) -> subprocess.CompletedProcess[str]:
    variables = {"PATH": os.environ["PATH"], "HOME": "/tmp", "DRY_RUN": "1", "NEXP": "2"} | PATHS | changes
    environment = {name: value for name, value in variables.items() if value}
    return subprocess.run(["bash", "-c", line], cwd=ROOT, env=environment, capture_output=True, text=True)


def commands(line: str, **changes: str) -> list[list[str]]:
    done = dry_run(line, **changes)
    assert done.returncode == 0, done.stderr
    programs = ("srun", "sbatch", "docker", "podman", "python", "bash")
    return [words for text in done.stdout.splitlines() if (words := shlex.split(text)) and words[0] in programs]


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
    assert found.index(rehearsal) < found.index(training(found)[0])
    assert not any("scripts/rehearse.sh" in words for words in commands(SLURM))


def test_ranks_and_container_of_a_training():
    (first,) = training(commands(SLURM))
    for word in ("--nodes=8", "--ntasks=64", "--ntasks-per-node=8", "--kill-on-bad-exit=1", "--label"):
        assert word in first
    (mounts,) = (word for word in first if word.startswith("--container-mounts="))
    assert mounts.partition("=")[2].split(",")[:3] == ["/my data:/data:ro", "/model:/ckpt:ro", "/nowhere/logs:/results:rw"]
    (names,) = (word for word in first if word.startswith("--container-env="))
    listed = names.partition("=")[2].split(",")
    assert {"LR", "SEED", "MASTER_PORT", "DATA_PATH", "NCCL_NVLS_ENABLE", "PYTORCH_CUDA_ALLOC_CONF"} < set(listed)
    assert not {"PATH", "HOME", "LD_LIBRARY_PATH", "CONT_MOUNTS"} & set(listed)


def test_all_that_settings_read_is_the_jobs_and_not_the_images():
    """Set in the job or not: a name that is not listed would have the image's value."""
    found = commands(SLURM, NCCL_IB_HCA="1", MYTHING="1", RANK="1")
    (names,) = (word for word in training(found)[0] if word.startswith("--container-env="))
    listed = set(names.partition("=")[2].split(","))
    assert settings.variables() | {"NCCL_IB_HCA", "PYTHON", "MASTER_ADDR", "BIND"} <= listed
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
    found = commands(f"source {config} && bash run.sub", PLATFORM="gpu", NCCL_TEST="0")
    (listed,) = (word for word in training(found)[0] if word.startswith("--container-env="))
    assert names <= set(listed.partition("=")[2].split(","))


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
        assert "SEED" in words
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
        ("bash run.sub", dict.fromkeys(PATHS, ""), [f"{name}: is not set" for name in (*PATHS, "DGXSYSTEM", "DGXNNODES")]),
        (SLURM, {"DATADIR": "/a:b", "HEALTH": "on"}, ["DATADIR=/a:b: a colon or comma", "HEALTH=on: must be one of"]),
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
