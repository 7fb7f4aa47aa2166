"""What needs a GPU, a driver and Transformer Engine's kernels: `python -m pytest -m gpu tests`, in the image."""

from __future__ import annotations

import importlib.util

import pytest
import torch


def missing() -> str:
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} sees no GPU"
    return "" if importlib.util.find_spec("transformer_engine_torch") else "Transformer Engine's kernels are not installed"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = missing()
    for item in items:
        if item.get_closest_marker("gpu") and reason:
            item.add_marker(pytest.mark.skip(reason=reason))
