"""What only the node knows, for `preflight.py --inside`: data files and their hashes, checkpoint, GPUs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llama2_lora.config.settings import Settings, SettingsError
from llama2_lora.config.shapes import shape_conflicts
from llama2_lora.data import inspection, packed
from llama2_lora.findings import Finding
from llama2_lora.gpus import Accelerator, accelerator_of
from llama2_lora.llama2 import LLAMA2_70B, LlamaShape
from llama2_lora.node import probe
from llama2_lora.weights import checkpoint

SYSTEM_SHARE = 0.02  # of a part's memory that drivers and firmware may keep


def inspect(settings: Settings) -> list[Finding]:
    """One finding per check, good ones too. Reads every byte of the data set, outside any run: run.sub drops the caches
    before each one."""
    checks = [_paths, _data, _checkpoint] + ([_gpus] if settings.system.platform == "gpu" else [])
    return [finding for check in checks for finding in check(settings)]


def check_paths(settings: Settings) -> None:
    """Raise SettingsError where a run's files are missing or its results cannot be written. Opens nothing."""
    if problems := list(_path_problems(settings)):
        raise SettingsError(problems)


def _path_problems(settings: Settings) -> Iterator[str]:
    run = settings.run
    for name in ("train.npy", "validation.npy"):
        if not (path := Path(run.data_path, name)).is_file():
            yield f"DATA_PATH={run.data_path}: {path} does not exist; run scripts/download_dataset.py"
    if not Path(run.checkpoint_path).is_dir():
        yield f"CKPT_PATH={run.checkpoint_path}: is not a folder; run scripts/convert_model.py or download_model.py"
    if not os.access(run.results_path, os.W_OK | os.X_OK):
        yield f"RESULTS_PATH={run.results_path}: is not a folder that this user can write to"


def check_shape(settings: Settings, shape: LlamaShape) -> None:
    """Raise SettingsError where the settings do not suit the checkpoint's model."""
    if problems := list(shape_conflicts(settings, shape)):
        raise SettingsError(problems)


def _paths(settings: Settings) -> Iterator[Finding]:
    problems = list(_path_problems(settings))
    yield from (Finding("error", "paths", problem) for problem in problems)
    if not problems:
        yield Finding("ok", "paths", "data, checkpoint and results folders are there")


def check_data(settings: Settings, vocab_size: int) -> None:
    """ValueError or OSError where the data set is not what the settings say. Looks at metadata alone: it may precede a run."""
    batch = settings.batch
    inspection.expected(Path(settings.run.data_path), batch.sequence_length, vocab_size, settings.system.platform == "gpu")


def _data(settings: Settings) -> Iterator[Finding]:
    folder = Path(settings.run.data_path)
    problems = inspection.problems(folder, settings.system.platform == "gpu", settings.batch.sequence_length)
    yield from (Finding("error", "data", problem) for problem in problems)
    if problems:
        return
    manifest = packed.read_manifest(folder)
    if manifest is None:
        yield Finding("unknown", "data", f"{folder} has no {packed.MANIFEST}: hashes cannot be checked")
        return
    for name, entry in manifest["files"].items():
        yield Finding("ok", "data", f"{name}: {entry['rows']} rows, {entry['bytes']:,} bytes, sha256 {entry['sha256'][:12]}...")


def _checkpoint(settings: Settings) -> Iterator[Finding]:
    folder = Path(settings.run.checkpoint_path)
    try:
        shape = checkpoint.read_shape(folder)
        if shape != LLAMA2_70B and not settings.rehearsal:
            raise ValueError(f"{folder}: {shape.parameters() / 1e9:.3g}e9 parameters; Llama-2-70B is expected")
        checkpoint.check_checkpoint(folder, shape, settings.weights_dtype)
    except (ValueError, OSError) as error:
        yield Finding("error", "checkpoint", str(error))
        return
    yield from (Finding("error", "checkpoint", problem) for problem in shape_conflicts(settings, shape))
    yield Finding("ok", "checkpoint", f"{shape.parameters() / 1e9:.3g}e9 parameters in {settings.weights_dtype}")


def _gpus(settings: Settings) -> Iterator[Finding]:
    seen = probe.parse_nvidia_smi(probe.run("nvidia-smi", "-q", "-x"))
    if seen is None:
        yield Finding("unknown", "gpus", "nvidia-smi is absent or failed")
        return
    wanted, devices = settings.system.gpus_per_node, seen["gpus"]
    names = sorted({device["name"] for device in devices})
    yield Finding("ok" if len(devices) == wanted else "error", "gpus", f"{len(devices)} of {wanted}: {', '.join(names)}")
    if part := accelerator_of(settings.system.accelerator, settings.system.name):
        yield from _memories(devices, part)


def _memories(devices: list[dict[str, Any]], part: Accelerator) -> Iterator[Finding]:
    needed = (1 - SYSTEM_SHARE) * part.memory_bytes / probe.GIB
    for i, device in enumerate(devices):
        if device["memory_gib"] and device["memory_gib"] < needed:
            text = f"GPU {i} has {device['memory_gib']:.0f} GiB: {part.name} has {needed:.0f} or more"
            yield Finding("error", "gpus", text)
