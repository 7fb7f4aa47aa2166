"""The CPU platform: a pretended CUDA device that ends with its context, and layers that refuse what they do not compute.

That its layers compute the right thing is in test_convert_model.py (logits) and test_parallel.py (training).
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from llama2_lora.training.cpu import cpu_layer_spec, cpu_platform, device


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
    names = [(owner, name) for owner, name, _ in device._stand_ins()]
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
    monkeypatch.setattr(device, "version", lambda package: "9.9.9")
    with pytest.raises(RuntimeError, match=r"nemo_toolkit is 9\.9\.9"), cpu_platform():
        pass


@pytest.mark.parametrize(
    ("changes", "expected"), [({"normalization": "LayerNorm"}, "RMSNorm only"), ({"attention_dropout": 0.1}, "set it to 0")]
)
def test_layers_refuse_what_they_do_not_compute(changes: dict, expected: str) -> None:
    config = SimpleNamespace(**({"normalization": "RMSNorm", "attention_dropout": 0.0} | changes))
    with pytest.raises(ValueError, match=expected):
        cpu_layer_spec(config)
