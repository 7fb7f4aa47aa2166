"""A Slurm cluster of five nodes on this machine, and jobs on it by the real sbatch. Root and Slurm's daemons are needed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.jobs import HERE, Cluster, Site, make_site

NODE_LOCAL = ("/run/spank_stub", "/run/l2ltest-disk")  # the second: a disk that every node has its own of


def missing() -> str:
    if os.geteuid() != 0:
        return "not root"
    commands = ("slurmctld", "slurmd", "sbatch", "munged", "ip", "unshare", "gcc")
    path = os.environ["PATH"] + ":/usr/sbin:/sbin"
    absent = [name for name in commands if not shutil.which(name, path=path)]
    if not absent and not Path("/usr/include/slurm/spank.h").exists():
        absent = ["slurm/spank.h"]
    packages = "slurmctld slurmd slurm-client slurm-wlm-basic-plugins munge iproute2 libslurm-dev gcc"
    return f"{', '.join(absent)} not found: apt-get install {packages}" if absent else ""


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    if reason := missing():
        (pytest.fail if os.environ.get("REQUIRE_SLURM") == "1" else pytest.skip)(f"no Slurm cluster: {reason}")
    rig = Path(tempfile.mkdtemp(prefix="l2ltest_"))  # not below pytest's folder, which other users cannot enter
    rig.chmod(0o755)
    compile_stub = ["gcc", "-std=gnu11", "-Wall", "-O2", "-fPIC", "-shared", "-o", rig / "spank_stub.so", HERE / "spank_stub.c"]
    subprocess.run(compile_stub, check=True)
    environment = {
        "PATH": f"{HERE}/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "HOME": "/tmp",
        "RIG": str(rig / "state"),
        "NODES": "5",  # one to spare for the job that loses one
        "SLURM_CONF": str(rig / "state/etc/slurm.conf"),
        "SPANK": f"required {rig}/spank_stub.so",
        "NODE_LOCAL": " ".join(NODE_LOCAL),
        "PYTHON_HOME": sys.base_prefix,
        "SITE": sysconfig.get_paths()["purelib"],
        "TRANSFORMER_ENGINE": str(Path(sys.prefix, "transformer_engine")),
    }
    cluster = Cluster(rig / "state", environment)
    try:
        cluster.control("up")
        yield cluster
    finally:
        cluster.run("scancel", "--me")
        cluster.control("down")
        shutil.rmtree(rig)


@pytest.fixture(scope="session")
def user_site(cluster: Cluster) -> Site:
    return make_site(cluster, cluster.rig.parent / "games' folder", "games")


@pytest.fixture(scope="session")
def site(cluster: Cluster) -> Site:
    return make_site(cluster, cluster.rig.parent / "a user's folder")
