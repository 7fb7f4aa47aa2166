"""What a config_*.sh exports: the file is sourced by bash, in a shell that holds nothing else."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path

from llama2_lora.findings import one_line

SOURCE_SECONDS = 5
SHELL_VARIABLES = ("PWD", "OLDPWD", "SHLVL", "_", "PATH")


def source(config: Path, given: Mapping[str, str] | None = None) -> dict[str, str]:
    """Name and value of every variable that `source CONFIG` exports, `given` being exported before. ValueError says why there
    are none."""
    if not config.is_file():
        meant = config.with_name(f"config_{config.name.removeprefix('config_').removesuffix('.sh')}.sh")
        raise ValueError(f"{config}: no such file{f'; is {meant} meant?' if meant.is_file() else ''}")
    if not fnmatch(config.name, "config_*.sh"):  # sourcing runs it, whatever it is
        raise ValueError(f"{config}: must be a config_*.sh")
    try:
        config.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{config}: is no UTF-8: byte {error.start}, {error.reason}; save it in that encoding") from None
    command = ["bash", "--noprofile", "--norc", "-c", 'source "$1" >&2 && env -0', "bash", str(config.resolve())]
    try:
        environment = {"PATH": os.defpath, **(given or {})}
        done = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, timeout=SOURCE_SECONDS)
        text, said = done.stdout.decode(), done.stderr.decode(errors="replace")
    except subprocess.TimeoutExpired:
        seconds = f"more than {SOURCE_SECONDS} s"
        raise ValueError(f"{config}: takes {seconds}; a config exports variables and does nothing else") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{config}: exports a value that is no UTF-8: {error.reason}") from None
    if done.returncode != 0:
        reason = said.strip().splitlines() or ["it prints nothing"]
        last = reason[-1].removeprefix(f"{config.resolve()}: ")  # said once; a long path would hide the reason
        raise ValueError(f"{config}: bash cannot source it: {one_line(last)}")
    pairs = dict(item.split("=", 1) for item in text.split("\0") if "=" in item)
    return {name: value for name, value in pairs.items() if name not in SHELL_VARIABLES}
