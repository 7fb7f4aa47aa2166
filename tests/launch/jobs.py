"""Batch jobs of run.sub on the tests' cluster, what they need, and what their logs say."""

from __future__ import annotations

import json
import os
import pwd
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from helpers.training_runs import make_data

ROOT = Path(__file__).resolve().parents[2]
HERE = ROOT / "tests/launch"
FIRST_SEED = 100  # as in payload.py


@dataclass
class Job:
    """One batch job of run.sub."""

    cluster: Cluster
    number: int
    output: Path
    results: Path

    def show(self) -> dict[str, str]:
        text = self.cluster.run("scontrol", "show", "job", str(self.number)).stdout
        return dict(re.findall(r"(\w+)=(\S*)", text))

    def nodes(self) -> list[str]:
        return self.cluster.run("scontrol", "show", "hostnames", self.show()["NodeList"]).stdout.split()

    def wait(self, timeout: float = 180) -> int:
        """Exit status once the job has ended; a job that a signal ended has 128 + signal."""
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        self.wait_for(lambda: self.show()["JobState"] in ended, timeout)
        status, number = self.show()["ExitCode"].split(":")
        return int(status) if number == "0" else 128 + int(number)

    def wait_for(self, condition: Callable[[], object], timeout: float) -> None:
        deadline = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < deadline, f"{self.show()}\n{self.leftovers()}\n{self.text()}"
            time.sleep(0.2)

    def text(self) -> str:
        return self.output.read_text(errors="replace") if self.output.exists() else ""

    def log(self, trial: int) -> Path:
        (found,) = self.results.glob(f"*_{self.number}_{trial}.log")
        return found

    def leftovers(self) -> list[str]:
        """Processes of the job, and containers of its name, on any node."""
        containers = [str(p) for p in self.cluster.rig.glob(f"nodes/*/local/run/spank_stub/*_{self.number}_*")]
        return containers + processes_with(f"SLURM_JOB_ID={self.number}")


@dataclass
class Cluster:
    rig: Path
    environment: dict[str, str]
    jobs: list[Job] = field(default_factory=list)

    def run(
        self, *command: str, user: str | None = None, folder: Path = ROOT, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        who = dict(user=user, group=pwd.getpwnam(user).pw_gid, extra_groups=[]) if user else {}
        environment = self.environment | variables
        return subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=60, **who)

    def control(self, *arguments: str) -> None:
        subprocess.run([HERE / "cluster.sh", *arguments], env=self.environment, check=True, timeout=60)

    def submit(
        self,
        results: Path,
        *options: str,
        script: Path = ROOT / "run.sub",
        user: str | None = None,
        folder: Path = ROOT,
        **variables: str,
    ) -> Job:
        """`source CONFIG && sbatch -N $DGXNNODES -t $WALLTIME run.sub` with these variables exported after the config."""
        output = results.parent / f"{results.name}.out"
        names = " ".join(f'{name}="${{V{i}}}"' for i, name in enumerate(variables))
        line = (
            f'source "{HERE}/config_CPU_2x2x4.sh"; export {names}; exec sbatch --parsable -N "$DGXNNODES" -t "$WALLTIME" "$@"'
        )
        hidden = {f"V{i}": value for i, value in enumerate(variables.values())}
        command = ["bash", "-c", line, "submit", f"--output={output}", *options, str(script)]
        done = self.run(*command, user=user, folder=folder, **hidden)
        assert done.returncode == 0, done.stderr
        job = Job(self, int(done.stdout), output, results)
        self.jobs.append(job)
        return job


def processes_with(variable: str) -> list[str]:
    """Command lines of all processes that have this variable, but for Slurm's own."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if variable.encode() in (process / "environ").read_bytes().split(b"\0") and "slurmstepd" not in command:
                found.append(command)
        except OSError:  # it has just ended
            continue
    return found


@dataclass(frozen=True)
class Site:
    """Folders of one user's jobs, with spaces in their names."""

    cluster: Cluster
    folder: Path
    user: str | None = None

    def paths(self, name: str) -> dict[str, str]:
        """What the README tells a user to export."""
        folder = self.folder
        names = {"DATADIR": "gov report", "MODEL": "check point", "LOGDIR": f"results {name}", "CONT": "image"}
        return {variable: str(folder / name) for variable, name in names.items()}

    def submit_as_documented(self, name: str, *options: str, **changes: str) -> Job:
        """The README's four variables, a config and sbatch, and nothing more; PAYLOAD is the image's."""
        variables = self.paths(name) | {"CONT": str(self.folder / "image with payload")} | changes
        return self.cluster.submit(self.folder / f"results {name}", *options, user=self.user, **variables)

    def submit(self, name: str, *options: str, script: Path = ROOT / "run.sub", folder: Path = ROOT, **changes: str) -> Job:
        """A job of the stand-in for training, unless `changes` say otherwise; an empty value leaves a variable out."""
        variables = (
            self.paths(name)
            | {
                "PAYLOAD": "pass",
                "NEXP": "1",
                "SEED": str(FIRST_SEED),
                "DROP_CACHES_COMMAND": "true",
            }
            | changes
        )
        variables = {name: value for name, value in variables.items() if value}
        results = self.folder / f"results {name}"
        return self.cluster.submit(results, *options, script=script, user=self.user, folder=folder, **variables)


def make_site(cluster: Cluster, folder: Path, user: str | None = None) -> Site:
    folder.mkdir(parents=True)
    make_files(folder)
    mounts = [("/usr", "/usr"), ("/run/l2ltest", "/run/l2ltest")]
    make_image(folder / "image", mounts)
    make_image(folder / "image with payload", mounts, PAYLOAD="pass")
    if user:
        subprocess.run(["chown", "-hR", f"{user}:", folder], check=True)
    return Site(cluster, folder, user)


IMAGE_VARIABLES = """\
LR=9
MLPERF_SUBMITTER=image
PYTHON=/nowhere/python
TARGET_LOSS=1.2
RANK=5
LOCAL_RANK=3
WORLD_SIZE=1
MASTER_ADDR=nowhere.invalid
MASTER_PORT=1
PATH=/opt/llama2_lora/bin:/usr/bin:/bin
"""
DEBIAN_PROFILE = """\
if [ "$(id -u)" -eq 0 ]; then
  PATH="/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
else
  PATH="/usr/local/bin:/usr/bin:/bin:/usr/local/games:/usr/games"
fi
export PATH
for i in /etc/profile.d/*.sh; do . "$i"; done
"""


def make_image(folder: Path, mounts: list[tuple[str, str]], **more: str) -> None:
    """A Debian image as a folder, whose variables contradict the job's; what it lacks are mounts, which its fstab lists."""
    for name in ("etc/profile.d", "tmp", "opt/llama2_lora/bin"):
        (folder / name).mkdir(parents=True)
    for name in ("bin", "sbin", "lib", "lib64"):
        (folder / name).symlink_to(f"usr/{name}")
    shutil.copy("/etc/ld.so.cache", folder / "etc")
    (folder / "etc/environment").write_text(IMAGE_VARIABLES + "".join(f"{name}={value}\n" for name, value in more.items()))
    (folder / "etc/profile").write_text(DEBIAN_PROFILE)
    (folder / "etc/fstab").write_text("".join(f"{source} {target} none bind,ro\n" for source, target in mounts))
    python = folder / "opt/llama2_lora/bin/python"
    python.write_text('#!/bin/sh\nexec /workspace/ft-llm/tests/launch/bin/python "$@"\n')
    python.chmod(0o755)
    environment = os.environ | {"LOGIN_PROFILE": str(folder / "etc/profile.d/llama2_lora.sh")}
    subprocess.run([ROOT / "scripts/lib/install_image.sh", "login", "/opt/llama2_lora"], check=True, env=environment)


def make_files(folder: Path) -> None:
    """What run.sub looks at: a data set and the outline of a checkpoint."""
    (folder / "gov report").mkdir()
    make_data(folder / "gov report")
    for name in ("context/model.yaml", "weights/metadata.json"):
        (folder / "check point" / name).parent.mkdir(parents=True)
        (folder / "check point" / name).write_text("{}")


def events(log: Path) -> list[dict]:
    """All :::MLLOG lines; each must parse."""
    return [json.loads(line.partition(":::MLLOG ")[2]) for line in log.read_text().splitlines() if ":::MLLOG " in line]


def values(log: Path, key: str) -> list:
    return [event["value"] for event in events(log) if event["key"] == key]


def run_stops(log: Path) -> list[str]:
    return [event["metadata"]["status"] for event in events(log) if event["key"] == "run_stop"]
