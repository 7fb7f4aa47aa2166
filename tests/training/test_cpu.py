"""The CPU platform: a pretended CUDA device that ends with its context, and Transformer Engine, which others do not see."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from helpers import ROOT
from helpers.training_runs import clean_environment
from llama2_lora.training.cpu import cpu_platform, device, extension, platform


def test_requests_for_a_cuda_device_get_the_cpu() -> None:
    with cpu_platform():
        made = torch.ones(2, device="cuda")
        assert made.device.type == "cpu"
        assert made.cuda().to("cuda:0").to(torch.device("cuda", 0)).device.type == "cpu"
        assert torch.empty(2, pin_memory=True).pin_memory().shape == (2,)
        assert torch.cuda.current_device() == 0
        assert made.type() == "torch.cuda.FloatTensor"  # what Megatron's optimizer insists on


def test_the_device_generator_is_the_cpus() -> None:
    with cpu_platform():
        torch.cuda.manual_seed(5)
        first = torch.rand(3)
        torch.manual_seed(5)
        assert torch.rand(3).tolist() == first.tolist()


def test_everything_is_as_before_afterwards() -> None:
    names = [
        (owner, name) for stand_ins in (device.stand_ins(device.HOPPER), extension.stand_ins()) for owner, name, _ in stand_ins
    ]
    before = [getattr(owner, name) for owner, name in names]
    with pytest.raises(KeyError), cpu_platform():
        raise KeyError("a run that fails")
    assert [getattr(owner, name) for owner, name in names] == before
    assert torch.ones(2).type() == "torch.FloatTensor"
    with pytest.raises((RuntimeError, AssertionError)):
        torch.ones(2, device="cuda")


def test_a_visible_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ValueError, match="CUDA_VISIBLE_DEVICES="), cpu_platform():
        pass


def test_other_library_versions_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "version", lambda package: "9.9.9")
    with pytest.raises(RuntimeError, match=r"nemo_toolkit is 9\.9\.9"), cpu_platform():
        pass


def test_a_call_without_a_kernel_raises_with_its_name() -> None:
    import transformer_engine_torch as tex

    with pytest.raises(NotImplementedError, match=r"transformer_engine_torch\.layernorm_fwd: has no CPU kernel"):
        tex.layernorm_fwd(torch.ones(2))
    with pytest.raises(NotImplementedError, match=r"transformer_engine_torch\.moe_permute_fwd"):
        tex.moe_permute_fwd()


def test_megatron_without_transformer_engine_is_refused() -> None:
    done = python("import megatron.core.utils, llama2_lora.training.cpu as c; c.cpu_platform().__enter__()")
    assert "megatron.core was imported before Transformer Engine" in done.stderr


@pytest.mark.parametrize("package", ["peft", "megatron.core", "transformers", "accelerate"])
def test_packages_that_know_transformer_engine_do_not_see_it(package: str) -> None:
    """Its wheel lies outside site-packages: on the path without kernels it breaks `import peft`."""
    done = python(f"import {package}, importlib.util as u; assert u.find_spec('transformer_engine') is None")
    assert done.returncode == 0, done.stderr[-2000:]


def python(code: str) -> subprocess.CompletedProcess[str]:
    environment = clean_environment(PYTHONPATH=f"{ROOT}/src", PYTHONWARNINGS="ignore")
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
