"""Generations of software: the same part is faster with later libraries, and a forecast has to say which it means.

On Blackwell a step of the same layout took 1.52 s in v5.0 and 1.30 s in v5.1 (8xB200, TP1 CP1, GBS 8); on Hopper nothing
changed from v4.1 to v5.1. A generation is named after the round that published it first; what marks it is the version of
Transformer Engine, which holds the kernels.
"""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass

from llama2_lora.gpus import Accelerator

# Transformer Engine of the NGC image that NVIDIA's entries of the round name: 24.09, 25.04, 25.09
FIRST_ENGINE = {"v4.1": (1, 10), "v5.0": (2, 2), "v5.1": (2, 7)}
NEWEST = "v5.1"
PACKAGES = ("transformer_engine", "transformer-engine", "transformer_engine_cu12", "transformer_engine_cu13")


@dataclass(frozen=True)
class Generation:
    """A generation, and why it was chosen."""

    name: str
    reason: str


def of_this_stack(part: Accelerator) -> Generation:
    """By the Transformer Engine that is installed here; where there is none, as on a login node, the newest one."""
    if part.name.startswith("MI"):
        return Generation(NEWEST, "the newest that was published on AMD's parts; their stack cannot be told from here")
    for package in PACKAGES:
        try:
            return by_engine(importlib.metadata.version(package))
        except importlib.metadata.PackageNotFoundError:
            continue
    reason = "Transformer Engine is not installed here, so the generation that this project's pinned one (2.9) belongs to"
    return Generation(NEWEST, reason)


def by_engine(version: str) -> Generation:
    """ValueError where the version is none."""
    numbers = tuple(int(part) for part in version.split(".")[:2])
    fitting = [name for name, first in FIRST_ENGINE.items() if numbers >= first]
    name = fitting[-1] if fitting else next(iter(FIRST_ENGINE))
    later = " or later" if name == NEWEST else ""
    return Generation(name, f"Transformer Engine {version} is that of {name}{later}")
