"""export_adapter.py: transformers with the export computes what NeMo computes with the adapter."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from helpers import ROOT
from helpers.nemo_model import launch
from helpers.tiny_llama import TINY, weights, write_llama
from llama2_lora.llama2 import adapter_shapes
from llama2_lora.weights.checkpoint import read_adapter, write_adapter
from llama2_lora.weights.convert import convert
from llama2_lora.weights.export import hf_adapter
from llama2_lora.weights.huggingface import HFModel, from_float32, to_float32

SCRIPT = ROOT / "scripts/export_adapter.py"
TOLERANCE = 1e-5
RANK, ALPHA = 4, 8
LAYOUTS = {"DP2": (1, 1), "TP2": (2, 1), "PP2": (1, 2)}


def script(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, SCRIPT, *map(str, arguments)], capture_output=True, text=True)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A base in both formats and a random adapter: `folder`/{base, nemo, adapter}."""
    folder = tmp_path_factory.mktemp("export")
    write_llama(folder / "base", shards=2)
    convert(HFModel(folder / "base"), folder / "nemo", "zarr")
    rng = np.random.default_rng(0)
    shapes = adapter_shapes(TINY, RANK)
    arrays = {name: rng.normal(0, 0.1, dims).astype(np.float32) for name, dims in shapes.items()}
    write_adapter(folder / "adapter", arrays, TINY, RANK, ALPHA)
    np.save(folder / "tokens.npy", rng.integers(0, TINY.vocab, (2, TINY.max_positions)))
    return folder


@pytest.fixture(scope="module")
def nemo(models):
    """Logits of NeMo with the adapter, and the adapter as each layout gathers it: `folder`/LAYOUT{.npy, /}."""
    shared = {"checkpoint": models / "nemo", "tokens": models / "tokens.npy", "adapter": models / "adapter"}
    jobs = [
        shared | {"logits": models / f"{name}.npy", "gathered": models / name, "tp": tp, "pp": pp}
        for name, (tp, pp) in LAYOUTS.items()
    ]
    launch(jobs, models)
    return models


def logits(model, folder: Path) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model.eval()(torch.from_numpy(np.load(folder / "tokens.npy"))).logits.numpy()


@pytest.fixture(scope="module")
def peft_logits(nemo):
    import torch
    from peft import AutoPeftModelForCausalLM

    done = script("--adapter", nemo / "DP2", "--output", nemo / "peft", "--base", nemo / "base")
    assert done.returncode == 0, done.stderr
    assert "peft.AutoPeftModelForCausalLM" in done.stdout
    return logits(AutoPeftModelForCausalLM.from_pretrained(nemo / "peft", dtype=torch.float32), nemo)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_peft_computes_what_nemo_computes(peft_logits, nemo, layout):
    assert np.abs(np.load(nemo / f"{layout}.npy") - peft_logits).max() < TOLERANCE


def test_adapter_matters_to_these_logits(peft_logits, nemo):
    """Without this the comparison above could compare two bare bases."""
    from transformers import LlamaForCausalLM

    bare = logits(LlamaForCausalLM.from_pretrained(nemo / "base"), nemo)
    assert np.abs(bare - peft_logits).max() > 0.1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gathers_the_same_adapter(nemo, layout):
    expected, found = read_adapter(nemo / "adapter"), read_adapter(nemo / layout)
    assert found[1:] == expected[1:]
    assert all((found[0][name] == array).all() for name, array in expected[0].items())


def test_peft_config(peft_logits, nemo):
    config = json.loads((nemo / "peft/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (RANK, ALPHA, str(nemo / "base"))
    assert sorted(config["target_modules"]) == ["k_proj", "o_proj", "q_proj", "v_proj"]


def test_merged_model_computes_the_same(peft_logits, nemo):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    done = script("--adapter", nemo / "adapter", "--output", nemo / "merged", "--base", nemo / "base", "--merge")
    assert done.returncode == 0, done.stderr
    merged = AutoModelForCausalLM.from_pretrained(nemo / "merged")
    assert np.abs(logits(merged, nemo) - peft_logits).max() < TOLERANCE
    assert AutoTokenizer.from_pretrained(nemo / "merged")("w5 w7")["input_ids"] == [5, 7]
    assert {path.name for path in (nemo / "merged").iterdir()} >= {path.name for path in (nemo / "base").iterdir()}


def test_merged_bf16_and_bin_files(nemo, tmp_path):
    """Rounded once, from float32; .bin shards become safetensors."""
    import torch
    from transformers import AutoModelForCausalLM

    write_llama(tmp_path / "base", dtype="bfloat16", shards=2, bin=True)
    done = script("--adapter", nemo / "adapter", "--output", tmp_path / "out", "--base", tmp_path / "base", "--merge")
    assert done.returncode == 0, done.stderr
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").state_dict()
    arrays, *_ = read_adapter(nemo / "adapter")
    for name, weight in weights(TINY, "bfloat16").items():
        expected = weight
        if name in (modules := hf_adapter(arrays, TINY)):
            a, b = map(torch.from_numpy, modules[name])
            expected = (weight.float() + ALPHA / RANK * (b @ a)).bfloat16()
        # Sums in another order may round to the neighbour.
        torch.testing.assert_close(found[name], expected, rtol=2**-7, atol=1e-6)
        assert (found[name] == expected).float().mean() > 0.99


def test_bf16_rounds_as_torch_does():
    import torch

    values = np.random.default_rng(0).normal(size=10_000).astype(np.float32)
    rounded = torch.from_numpy(values).bfloat16()
    assert from_float32(values, "BF16") == rounded.view(torch.int16).numpy().tobytes()
    assert (to_float32(from_float32(values, "BF16"), "BF16") == rounded.float().numpy()).all()


def test_hf_adapter_takes_the_rows_of_b_apart():
    """4 heads of 2 rows in 2 groups: the rows of B are q0 q1 k0 v0 q2 q3 k1 v1, two each."""
    shape = dataclasses.replace(TINY, layers=1, hidden=8, heads=4, kv_groups=2)
    arrays = {name: np.zeros(dims) for name, dims in adapter_shapes(shape, 1).items()}
    arrays["decoder.layers.0.self_attention.linear_qkv.adapter.linear_out.weight"][:, 0] = range(16)
    found = {name.split(".")[4]: b[:, 0].tolist() for name, (_, b) in hf_adapter(arrays, shape).items()}
    assert found["q_proj"] == [0, 1, 2, 3, 8, 9, 10, 11]
    assert found["k_proj"] == [4, 5, 12, 13]
    assert found["v_proj"] == [6, 7, 14, 15]


def test_refusals_in_one_line(models, tmp_path):
    other = dataclasses.replace(TINY, ffn=64)
    write_llama(tmp_path / "other", other)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").write_text("mine")
    adapter = ("--adapter", models / "adapter")
    cases = {
        "SAVE_ADAPTER": ("--adapter", tmp_path, "--output", tmp_path / "out"),
        "is there already": (*adapter, "--output", tmp_path / "full", "--base", tmp_path / "other"),
        "name its base with --base": (*adapter, "--output", tmp_path / "out"),
        "was trained on": (*adapter, "--output", tmp_path / "out", "--base", tmp_path / "other", "--merge"),
    }
    for message, arguments in cases.items():
        done = script(*arguments)
        assert (done.returncode, len(done.stderr.splitlines())) == (1, 1), done.stderr
        assert message in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "other"]
