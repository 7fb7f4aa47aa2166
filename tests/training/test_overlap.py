"""The userbuffers that the H100 configs ship (TP 4, SP) give the losses and gradients of no overlap, in fp32 and in FP8.

Transformer Engine's own `initialize_ub` and control flow run; the collectives behind the buffers block. What a setting leaves
out of a sum is left out here too: bulk overlap on the frozen base leaves the input's gradient unsummed over the ranks.

A launched copy of this file sends the two adapted layers' input forward and back under every mix of Megatron's flags.
"""

from __future__ import annotations

import itertools
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from helpers import ROOT
from helpers.environments import VALID
from helpers.many_runs import Done, run_many
from helpers.training_runs import Tiny, clean_environment, make_model

FP8 = {"FP8": "1", "FP8_PARAMS": "1"}
OVERLAP = {"TP_COMM_OVERLAP": "1", "ACCELERATOR": "H100"}
RUNS = {"plain": {}, "overlap": OVERLAP, "fp8": FP8, "fp8_overlap": FP8 | OVERLAP}
COMMON = {"TP": "4", "SP": "1", "MINIBS": "8", "MAX_STEPS": "6", "LORA_DROPOUT": "0"}


@pytest.fixture(scope="module")
def runs(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Done]:
    folder = tmp_path_factory.mktemp("tp4")
    # FP8 wants multiples of 16 on every rank
    make_model(folder / "hf", hidden_size=64, intermediate_size=64, num_attention_heads=8, num_key_value_heads=4)
    convert = [sys.executable, ROOT / "scripts/convert_model.py", "--source", folder / "hf"]
    subprocess.run([*convert, "--output_path", folder / "checkpoint"], check=True, capture_output=True)
    return run_many(Tiny(folder / "hf", folder / "checkpoint", tiny.data), folder, RUNS, 4, **COMMON)


@pytest.mark.parametrize(("plain", "overlap"), [("plain", "overlap"), ("fp8", "fp8_overlap")])
def test_shipped_overlap_gives_the_gradients_of_none(plain: str, overlap: str, runs: dict[str, Done]) -> None:
    for key, expected in runs[plain].losses().items():
        assert runs[overlap].losses()[key] == pytest.approx(expected, abs=1e-5)
    for rank in range(4):
        expected_gradients, gradients = runs[plain].gradients(rank), runs[overlap].gradients(rank)
        for name, expected in expected_gradients.items():
            assert np.abs(gradients[name] - expected).max() < 1e-5, name


def test_userbuffers_were_made(runs: dict[str, Done]) -> None:
    """Transformer Engine says so on stdout; without it the comparison would be of a run with itself."""
    made = {name: "[UB] Number of TP domains: 1" in run.log for name, run in runs.items()}
    assert made == {"plain": False, "overlap": True, "fp8": False, "fp8_overlap": True}


def test_fp8_is_not_fp32(runs: dict[str, Done]) -> None:
    losses = {name: run.losses()["train_loss"] for name, run in runs.items()}
    assert max(abs(a - b) for a, b in zip(losses["plain"], losses["fp8"], strict=True)) > 1e-4


FLAGS = ("tp_comm_overlap_ag", "tp_comm_overlap_rs", "tp_comm_overlap_rs_dgrad", "tp_comm_overlap_disable_qkv")
S, H, TP = 16, 64, 2


def worker(report: Path) -> None:
    import torch

    from llama2_lora.training.cpu import cpu_platform

    found = {}
    with cpu_platform():
        from megatron.core import parallel_state
        from transformer_engine.pytorch.module import initialize_ub

        from llama2_lora.config.settings import Settings
        from llama2_lora.training.overlap import userbuffers

        torch.distributed.init_process_group("gloo")
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=TP)
        buffers = {name: buffer for name, buffer in asdict(userbuffers(Settings.from_env(VALID))).items() if buffer}
        initialize_ub([S, H], TP, ub_cfgs=buffers, bootstrap_backend="gloo")
        for mix in [None, *itertools.product((False, True), repeat=len(FLAGS))]:
            flags = {} if mix is None else dict(zip(FLAGS, mix, strict=True)) | {"tp_comm_overlap": True}
            found[str(mix)] = gradients(flags)
    np.savez(report / f"rank{torch.distributed.get_rank()}.npz", **found)
    torch.distributed.barrier()


def gradients(flags: dict[str, bool]) -> np.ndarray:
    """Of the layer's input, then of the four adapter matrices, one after the other: linear_qkv, part of it, linear_proj."""
    import torch
    from megatron.core.pipeline_parallel.schedules import custom_backward  # what Megatron's training steps call
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    from llama2_lora.training.adapter import SeededLoRA

    model_parallel_cuda_manual_seed(1, force_reset_rng=True)  # the layers'
    torch.manual_seed(torch.distributed.get_rank())
    lora = SeededLoRA(seed=1, rank=4, alpha=8, dropout=0.0)
    qkv, proj = (lora.transform(layer, name, "decoder.layers.0.self_attention") for name, layer in frozen_layers(flags))
    factors = [weight for layer in (qkv, proj) for weight in layer.adapter.parameters()]
    for weight in factors:
        torch.nn.init.normal_(weight)
    x_SBH = torch.randn(S // TP, 1, H, requires_grad=True)
    out_SBH, _ = proj(qkv(x_SBH)[0][..., : H // TP].contiguous())
    custom_backward((out_SBH * torch.randn_like(out_SBH)).sum(), None)
    return torch.cat([tensor.grad.flatten() for tensor in (x_SBH, *factors)]).numpy()


def frozen_layers(flags: dict[str, bool]) -> list[tuple[str, Any]]:
    import torch
    from megatron.core.extensions.transformer_engine import TELayerNormColumnParallelLinear, TERowParallelLinear
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(
        num_layers=1,
        hidden_size=H,
        num_attention_heads=4,
        normalization="RMSNorm",
        add_bias_linear=False,
        tensor_model_parallel_size=TP,
        sequence_parallel=True,
        tp_comm_bulk_wgrad=False,
        tp_comm_bulk_dgrad=False,
        **flags,
    )
    common = SimpleNamespace(config=config, init_method=torch.nn.init.normal_, bias=False, skip_bias_add=False, is_expert=False)
    layers = {
        "linear_qkv": TELayerNormColumnParallelLinear(H, 3 * H, gather_output=False, tp_comm_buffer_name="qkv", **vars(common)),
        "linear_proj": TERowParallelLinear(H, H, input_is_parallel=True, tp_comm_buffer_name="proj", **vars(common)),
    }
    for layer in layers.values():
        layer.requires_grad_(False)
    return list(layers.items())


def test_every_mix_of_overlaps_gives_the_gradients_of_none(tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={TP}"]
    environment = clean_environment(PYTHONPATH=f"{ROOT}/src:{ROOT}/tests")
    done = subprocess.run([*torchrun, __file__, tmp_path], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    for rank in range(TP):
        with np.load(tmp_path / f"rank{rank}.npz") as arrays:
            found = dict(arrays)
        expected = found.pop("None")
        assert np.abs(expected[: S // TP * H]).min() > 0  # the input's: it reached the norm
        assert len(found) == 2 ** len(FLAGS)
        for mix, ours in found.items():
            np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max(), err_msg=f"{FLAGS}: {mix}")


if __name__ == "__main__":
    worker(Path(sys.argv[1]))
