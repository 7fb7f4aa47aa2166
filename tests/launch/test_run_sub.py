"""run.sub on a real Slurm cluster: what a passing run leaves, and how each failure ends."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from helpers.training_runs import make_data
from launch.jobs import run_stops, values

pytestmark = pytest.mark.slurm


def run_started(job, trial: int) -> bool:
    return any('"run_start"' in path.read_text() for path in job.results.glob(f"*_{trial}.log"))


def assert_clean(job) -> None:
    job.wait_for(lambda: not job.leftovers(), 30)


@pytest.fixture(scope="module", autouse=True)
def time_limited(site):
    """Slurm's limits take a minute or more: this job runs beside the other tests, and the last one looks at it."""
    return site.submit("limited", "--time=1", "--signal=B:USR1@50", PAYLOAD="hang", NEXP="2")


def times_dropped() -> int:
    """How often this kernel was told to drop its page cache."""
    return int(dict(line.split() for line in Path("/proc/vmstat").read_text().splitlines())["drop_pagecache"])


def test_a_job_as_the_readme_writes_it(site):
    """Nothing is set but the four paths and the config: default commands, the image's python, a random seed."""
    before = times_dropped()
    job = site.submit_as_documented("documented")
    assert job.wait() == 0, job.text()
    assert values(job.log(1), "cache_clear") == [True, True]
    assert times_dropped() >= before + 2, "the log says so: it must be so"
    assert "compliance passed" in job.text()
    assert {"TARGET_LOSS=", "RANK=", "LR=5e-4"} <= set(job.log(1).with_suffix(".env").read_text().splitlines())
    assert_clean(job)


def test_a_job_of_a_user_with_sudo(user_site):
    rig = user_site.cluster.rig
    (rig / "sudoers").write_text("games\n")
    (rig / "sudo_games").touch()
    (rig / "sudo_games").chmod(0o666)
    job = user_site.submit_as_documented("with sudo")
    status = job.wait()
    (rig / "sudoers").unlink()
    assert status == 0, job.text()
    assert values(job.log(1), "cache_clear") == [True, True]
    assert sorted((rig / "sudo_games").read_text().splitlines()) == [
        f"{node}: -n /sbin/sysctl -q vm.drop_caches=3" for node in job.nodes()
    ]


def test_a_job_of_a_user_who_may_not_drop_caches(user_site):
    job = user_site.submit_as_documented("without sudo")
    assert job.wait() == 1, job.text()
    assert "the caches were not dropped; give the job's user the right" in job.text()
    assert "trial 1 finished with status 1" in job.log(1).read_text()
    assert_clean(job)


def test_two_trials_pass_and_leave_their_files(site):
    job = site.submit("passing", PAYLOAD="pass pass", NEXP="2")
    assert job.wait() == 0, job.text()
    suffixes = {path.name.split(f"_{job.number}_", 1)[-1] for path in job.results.iterdir()}
    assert suffixes >= {"health.jsonl"} | {f"{trial}.{kind}" for trial in (1, 2) for kind in ("log", "env", "compliance")}
    for trial in (1, 2):
        log = job.log(trial)
        assert values(log, "cache_clear") == [True, True], "one per node"
        assert values(log, "seed") == [99 + trial]
        assert run_stops(log) == ["success"]
        assert "SUCCESS" in log.with_suffix(".compliance").read_text()
        assert f"SEED={99 + trial}\n" in log.with_suffix(".env").read_text()
        assert f"trial {trial} finished with status 0: training passed, compliance passed" in job.text()
    assert_clean(job)
    assert f"cleanup_{job.number}" not in site.cluster.run("squeue", "--format=%j").stdout


def test_the_jobs_variables_win_over_the_images(site):
    job = site.submit("environment", MLPERF_SUBMITTER="job")
    assert job.wait() == 0, job.text()
    assert "MLPERF_SUBMITTER=image" in (site.folder / "image/etc/environment").read_text()
    assert values(job.log(1), "submission_org") == ["job"]
    assert values(job.log(1), "opt_base_learning_rate") == [5e-4]


def test_a_user_who_is_not_root(user_site):
    job = user_site.submit("own", DROP_CACHES_COMMAND="", DROP_CACHES="try")
    assert job.wait() == 0, job.text()
    assert job.log(1).owner() == user_site.user
    assert values(job.log(1), "cache_clear") == [False, False], "the log must not claim what the user has no right to do"
    assert "the caches were not dropped (DROP_CACHES=try)" in job.text()
    assert_clean(job)


def test_without_containers_from_a_tree_with_a_space_in_its_path(site):
    tree = site.folder / "my tree"
    tree.symlink_to(Path(__file__).resolve().parents[2])
    job = site.submit("bare", script=tree / "run.sub", CONT="none", SLURM_MPI_TYPE="pmi2", PYTHON="tests/launch/bin/python")
    assert job.wait() == 0, job.text()
    assert f"tree {tree}," in job.text()
    assert_clean(job)


def test_relative_paths_are_meant_from_the_folder_of_the_sbatch_call(site):
    (site.folder / "tree").symlink_to(Path(__file__).resolve().parents[2])
    relative = {"DATADIR": "gov report", "MODEL": "./check point", "LOGDIR": "results relative", "CONT": "./image"}
    job = site.submit("relative", "--chdir=/tmp", script=Path("tree/run.sub"), folder=site.folder, **relative)
    assert job.wait() == 0, job.text()
    assert run_stops(job.log(1)) == ["success"]


def test_a_folder_that_cannot_be_written_ends_the_job_at_once(user_site):
    for number, (folder, problem) in enumerate({"/usr/nowhere": "cannot be made", "/usr": "games cannot write there"}.items()):
        job = user_site.submit(f"unwritable{number}", LOGDIR=folder)
        assert job.wait() == 2, job.text()
        assert f"LOGDIR={folder}: {problem}" in job.text()


def test_the_all_reduce_is_measured(site):
    """The default on GPUs."""
    job = site.submit("allreduce", NCCL_TEST="1")
    assert job.wait() == 0, job.text()
    assert "measuring the all-reduce bandwidth" in job.text()
    (measured,) = job.results.glob("*_allreduce.txt")
    assert "bus_gb_per_s" in measured.read_text()


def test_more_mounts(site):
    """Here the interpreter is where only the mount puts it."""
    (site.folder / "extra").mkdir()
    python = site.folder / "extra/python"
    python.write_text('#!/bin/sh\nexec /workspace/ft-llm/tests/launch/bin/python "$@"\n')
    python.chmod(0o755)
    job = site.submit("mounts", EXTRA_MOUNTS=f"{python.parent}:/extra:ro", PYTHON="/extra/python")
    assert job.wait() == 0, job.text()


def test_a_failed_trial_does_not_stop_the_next_and_the_worst_status_counts(site):
    job = site.submit("failing", PAYLOAD="exit3 missed silent pass", NEXP="4")
    assert job.wait() == 4, job.text()
    text = job.text()
    assert "trial 1 finished with status 3: training FAILED (3), compliance FAILED" in text, (
        "not that of the ranks it took along"
    )
    assert "trial 2 finished with status 1: training FAILED (1), compliance FAILED" in text
    assert "trial 3 finished with status 4: training passed, compliance FAILED" in text
    assert "trial 4 finished with status 0" in text
    assert [run_stops(job.log(trial)) for trial in (1, 2, 3, 4)] == [["aborted"], ["aborted"], ["success"], ["success"]]
    assert_clean(job)


def test_stop_on_failure(site):
    job = site.submit("stopping", PAYLOAD="missed pass", NEXP="2", STOP_ON_FAILURE="1")
    assert job.wait() == 1, job.text()
    assert not list(job.results.glob("*_2.log"))


def test_a_killed_rank_ends_the_others(site):
    job = site.submit("killed", PAYLOAD="killed")
    assert job.wait() > 128, job.text()
    assert "task 3: Killed" in job.log(1).read_text()
    assert run_stops(job.log(1)) == ["aborted"]
    assert_clean(job)


def test_scancel_closes_the_log(site):
    job = site.submit("cancelled", PAYLOAD="hang hang", NEXP="2")
    job.wait_for(lambda: run_started(job, 1), 60)
    site.cluster.run("scancel", str(job.number))
    job.wait()
    assert job.show()["JobState"] == "CANCELLED"
    assert run_stops(job.log(1)) == ["aborted"]
    assert not list(job.results.glob("*_2.log"))
    assert_clean(job)


def test_a_requeue_after_a_lost_node_keeps_finished_trials(site):
    job = site.submit("requeued", PAYLOAD="pass hang_once", NEXP="2", VBOOST="1")
    job.wait_for(lambda: run_started(job, 2), 60)
    first = job.log(1).stat()
    lost = job.nodes()[1]
    site.cluster.control("stop_node", lost.removeprefix("node"))
    site.cluster.run("scontrol", "update", f"NodeName={lost}", "State=DOWN", "Reason=test")
    job.wait_for(lambda: job.show()["JobState"] == "PENDING", 30)
    site.cluster.run("scontrol", "update", f"JobId={job.number}", "StartTime=now+4")  # not Slurm's two minutes
    assert job.wait() == 0, job.text()
    assert lost not in job.nodes()
    assert vboosts(job) == ["0 0\n", "0 0\n"]
    assert (gpus(job, lost) / "vboost").read_text() == "1 1\n"
    assert "trial 1 was finished before (status 0)" in job.text()
    assert (job.log(1).stat().st_mtime_ns, job.log(1).stat().st_ino) == (first.st_mtime_ns, first.st_ino)
    (interrupted,) = job.results.glob("*_2.log.interrupted_*")
    assert run_stops(interrupted) == ["aborted"]
    (environment,) = job.results.glob("*_2.env.interrupted_*")
    assert f"SEED={values(interrupted, 'seed')[0]}" in environment.read_text().splitlines()
    assert run_stops(job.log(2)) == ["success"]
    site.cluster.control("start_node", lost.removeprefix("node"))
    assert_clean(job)  # once it is back, the booked cleanup job finds what the lost node still had
    job.wait_for(lambda: (gpus(job, lost) / "vboost").read_text() == "0 0\n", 10)


def test_a_dead_node_does_not_keep_the_containers_of_the_others(site):
    job = site.submit("dead", "--no-requeue", PAYLOAD="hang")
    job.wait_for(lambda: run_started(job, 1), 60)
    alive, dead = job.nodes()
    assert containers(job, alive)
    assert containers(job, dead)
    site.cluster.control("stop_node", dead.removeprefix("node"))
    site.cluster.run("scontrol", "update", f"NodeName={dead}", "State=DOWN", "Reason=test")
    job.wait_for(lambda: not containers(job, alive), 60)
    site.cluster.control("start_node", dead.removeprefix("node"))
    site.cluster.run("scontrol", "update", f"NodeName={dead}", "State=RESUME")
    assert_clean(job)


def gpus(job, node: str) -> Path:
    """What bin/nvidia-smi keeps of a node's GPUs."""
    return job.cluster.rig / f"nodes/{node}/local/run/l2ltest-disk/gpus"


def vboosts(job) -> list[str]:
    return [(gpus(job, node) / "vboost").read_text() for node in job.nodes()]


def test_clocks_are_set_for_the_trials_and_put_back(site):
    job = site.submit("clocks", PAYLOAD="hang", VBOOST="1", GPU_CLOCKS="1980", STOP_ON_FAILURE="1")
    job.wait_for(lambda: run_started(job, 1), 60)
    assert vboosts(job) == ["1 1\n", "1 1\n"]
    assert [(gpus(job, node) / "locked").read_text() for node in job.nodes()] == ["1980 1980\n", "1980 1980\n"]
    site.cluster.run("scancel", "--signal=USR1", "--batch", str(job.number))  # what Slurm sends near the time limit
    assert job.wait() == 124, job.text()
    assert vboosts(job) == ["0 0\n", "0 0\n"]
    assert [(gpus(job, node) / "locked").read_text() for node in job.nodes()] == ["no no\n", "no no\n"]
    for node in job.nodes():
        assert f"run.sub: {node}: VBOOST=1: set, was 0\n" in job.text()
    assert not list(job.results.glob(".gpu_clocks*"))
    assert f"cleanup_{job.number}" not in site.cluster.run("squeue", "--format=%j").stdout


def test_clocks_are_put_back_after_scancel(site):
    """A cancelled job may launch nothing: the booked jobs do it, without a container too."""
    bare = {"CONT": "none", "PYTHON": "tests/launch/bin/python"}
    job = site.submit("clocks2", "--gpus-per-node=2", PAYLOAD="hang", VBOOST="1", **bare)
    job.wait_for(lambda: run_started(job, 1), 60)
    for node in job.nodes():
        (gpus(job, node) / "constrained").touch()
    assert vboosts(job) == ["1 1\n", "1 1\n"]
    site.cluster.run("scancel", str(job.number))
    job.wait()
    job.wait_for(lambda: vboosts(job) == ["0 0\n", "0 0\n"], 30)
    job.wait_for(lambda: not list(job.results.glob(".gpu_clocks*")), 10)
    for node in job.nodes():
        (said,) = job.results.glob(f"*_{job.number}_cleanup_{node}.txt")
        assert said.read_text() == f"run.sub: {node}: vboost put back: 0\n"
        (gpus(job, node) / "constrained").unlink()
    assert_clean(job)


def test_a_node_that_cannot_put_its_clocks_back_does_not_keep_others_from_it(site):
    job = site.submit("clocks3", PAYLOAD="hang", VBOOST="1", STOP_ON_FAILURE="1")
    job.wait_for(lambda: run_started(job, 1), 60)
    stuck, other = job.nodes()
    (gpus(job, stuck) / "refuses").write_text("*")
    (gpus(job, other) / "slow").touch()
    site.cluster.run("scancel", "--signal=USR1", "--batch", str(job.number))
    assert job.wait() == 124, job.text()
    (gpus(job, stuck) / "refuses").unlink()
    (gpus(job, other) / "slow").unlink()
    assert f"run.sub: {stuck}: error: vboost: could not be put back to 0" in job.text()
    assert f"run.sub: {other}: vboost put back: 0\n" in job.text()
    job.wait_for(lambda: vboosts(job) == ["0 0\n", "0 0\n"], 30)  # the booked job of the stuck one tries again


def test_a_requeued_job_puts_back_what_its_first_life_found(site):
    job = site.submit("again", "--nodelist=node3,node4", PAYLOAD="hang_once", VBOOST="2")
    job.wait_for(lambda: run_started(job, 1), 60)
    site.cluster.run("scontrol", "requeue", str(job.number))
    job.wait_for(lambda: job.show()["JobState"] == "PENDING", 30)
    site.cluster.run("scontrol", "update", f"JobId={job.number}", "StartTime=now+4")  # not Slurm's two minutes
    assert job.wait() == 0, job.text()
    assert "VBOOST=2: it was set" in job.text()
    assert vboosts(job) == ["0 0\n", "0 0\n"]


def test_a_user_who_may_not_set_clocks(user_site):
    """The trial is run all the same."""
    job = user_site.submit("no clocks", VBOOST="1", GPU_CLOCKS="1980")
    assert job.wait() == 0, job.text()
    for node in job.nodes():
        assert f"run.sub: {node}: warning: VBOOST=1: not set, still 0: sudo: a password is required" in job.text()
        assert f"run.sub: {node}: warning: GPU_CLOCKS=1980: not set: sudo: a password is required" in job.text()
    assert vboosts(job) == ["0 0\n", "0 0\n"]


def containers(job, node: str) -> list[Path]:
    return list((job.cluster.rig / f"nodes/{node}/local/run/spank_stub").glob(f"*_{job.number}_*"))


def test_a_users_own_enroot_folders(site):
    """Pyxis does not look at them, so the containers are not there."""
    job = site.submit("enroot", ENROOT_DATA_PATH="/nowhere", ENROOT_RUNTIME_PATH="/nowhere")
    assert job.wait() == 0, job.text()
    assert "could not be removed" not in job.text()
    assert not [path for node in job.nodes() for path in containers(job, node)]


def test_all_unset_variables_are_named_at_once(site):
    job = site.submit("unset", MODEL="", CONT="", HEALTH="maybe")
    assert job.wait() == 2
    for problem in ("CONT MODEL: not set: export them before sbatch", "HEALTH=maybe: must be one of off warn fail"):
        assert problem in job.text()


def test_missing_image(site):
    job = site.submit("image", CONT=str(site.folder / "no such image"))
    assert job.wait() == 1
    assert "no such image: the container cannot be made" in job.text()
    assert_clean(job)


def test_missing_data_stops_the_job_even_without_health_checks(site):
    (site.folder / "empty").mkdir()
    job = site.submit("data", DATADIR=str(site.folder / "empty"), HEALTH="off")
    assert job.wait() == 1, job.text()
    assert "is DATADIR the folder that download_dataset.py wrote?" in job.text()
    assert not list(job.results.glob("*.log"))
    assert_clean(job)


def test_data_that_one_node_lacks_and_data_that_differ(site):
    disks = [site.cluster.rig / f"nodes/node{k}/local/run/l2ltest-disk" for k in (3, 4)]
    make_data(disks[0])
    job = site.submit("mount", "--nodelist=node3,node4", DATADIR="/run/l2ltest-disk/data")
    assert job.wait() == 2, "not on the batch host"
    assert "DATADIR=/run/l2ltest-disk/data: is not a folder on node3" in job.text()
    (disks[0] / "data").mkdir()
    job = site.submit("mount2", "--nodelist=node3,node4", DATADIR="/run/l2ltest-disk/data")
    assert job.wait() == 1, "not on the second node"
    assert "a node could not run the probe" in job.text()
    shutil.copytree(disks[0], disks[1], dirs_exist_ok=True)
    os.truncate(disks[1] / "train.npy", 1000)
    job = site.submit("differ", "--nodelist=node3,node4", DATADIR="/run/l2ltest-disk")
    assert job.wait() == 1
    assert "train.npy has 1000 bytes, manifest says" in job.text()
    assert "node4" in job.text()


def test_caches_that_cannot_be_dropped(site):
    job = site.submit("caches", DROP_CACHES_COMMAND="false")
    assert job.wait() == 1, job.text()
    assert "the caches were not dropped; give the job's user the right" in job.text()


def test_a_container_of_another_job_stays(site):
    state = site.cluster.rig / "nodes/node1/local/run/spank_stub"
    state.mkdir(exist_ok=True)
    (state / "0_llama2_lora_999_0").symlink_to("/somewhere")
    assert site.submit("neighbour").wait() == 0
    assert (state / "0_llama2_lora_999_0").is_symlink()


def test_the_time_limit_leaves_time_to_close_the_log(time_limited):
    assert time_limited.wait(180) == 124, time_limited.text()
    assert "the time limit is near: run_stop (aborted) written for it" in time_limited.text()
    assert run_stops(time_limited.log(1)) == ["aborted"]
    assert not list(time_limited.results.glob("*_2.log"))
    assert_clean(time_limited)
