"""Which packages belong to which environment, and one line instead of a traceback where one is missing.

with missing_package_named():
    from rich.table import Table    # error: rich is not installed: pip install -r requirements-light.txt
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

# By import name. What answers on a login node, and what training, conversion and pictures need besides.
LIGHT = frozenset(("mlperf_logging", "numpy", "rich", "tqdm", "yaml"))
# fmt: off
FULL = frozenset((
    "datasets", "huggingface_hub", "lightning", "matplotlib", "megatron", "nemo", "peft", "pyarrow", "requests", "safetensors",
    "scipy", "tenacity", "tokenizers", "torch", "transformer_engine", "transformers",
))
# fmt: on


def install_line(package: str) -> str:
    """The command that brings a package."""
    return "pip install -r requirements-light.txt" if package in LIGHT else "scripts/setup_env.sh"


@contextmanager
def missing_package_named() -> Iterator[None]:
    """Ends the program with status 2 and one line where a known package cannot be found; other errors pass."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0]
        if package not in LIGHT | FULL:
            raise
        print(f"error: {package} is not installed: {install_line(package)}", file=sys.stderr)
        raise SystemExit(2) from None
