"""rehearsal_model.py: the Hugging Face folder that it writes, what decides the weights, and refusals."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

from helpers import ROOT
from llama2_lora.llama2 import LlamaShape

S = 32
main = runpy.run_path(str(ROOT / "scripts/rehearsal_model.py"))["main"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("rehearsal") / "data"
    make_data = runpy.run_path(str(ROOT / "scripts/rehearsal_data.py"))["main"]
    assert make_data(["--output", str(output), "--sequence_length", str(S)]) == 0
    return output


def make(data: Path, output: Path, *options: object) -> int:
    return main(["--data", str(data), "--output", str(output), *map(str, options)])


@pytest.fixture(scope="module")
def model(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("rehearsal") / "new" / "base"
    assert make(data, output, "--steps", 20) == 0
    return output


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def test_it_is_a_small_llama_2(model: Path) -> None:
    shape = LlamaShape.from_hf_config(json.loads((model / "config.json").read_text()))
    assert shape == LlamaShape(
        layers=4,
        hidden=128,
        ffn=384,
        heads=8,
        kv_groups=2,
        vocab=768,
        max_positions=S,
        norm_eps=1e-5,
        rope_base=10000.0,
        tied=False,
    )


def test_transformers_loads_model_and_tokenizer_and_it_has_learned(model: Path, data: Path) -> None:
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    llama, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    assert len(tokenizer) == llama.config.vocab_size
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (llama.config.bos_token_id, llama.config.eos_token_id) == (1, 2)
    text = "### Findings:\n- 45 percent of fares were late in 2020."
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == 1
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    base_text = torch.from_numpy(np.load(data / "base_text.npy")[: 100 * S].astype(np.int64)).view(-1, S)
    with torch.no_grad():
        assert llama(input_ids=base_text, labels=base_text).loss < 6  # ln(768) = 6.6 before


def test_the_seed_decides_the_weights(model: Path, data: Path, tmp_path: Path) -> None:
    assert make(data, tmp_path / "same", "--steps", 20) == 0
    assert weights(tmp_path / "same") == weights(model)
    assert make(data, tmp_path / "other", "--steps", 20, "--seed", 2) == 0
    assert weights(tmp_path / "other") != weights(model)


def test_a_second_call_makes_nothing(model: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = (model / "model.safetensors").stat().st_mtime_ns
    assert make(data, model, "--steps", 20) == 0
    assert capsys.readouterr().out == f"{model}: is up to date\n"
    assert (model / "model.safetensors").stat().st_mtime_ns == made
    assert [path.name for path in model.parent.iterdir()] == [model.name]


def test_other_steps_replace_it(data: Path, tmp_path: Path) -> None:
    output = tmp_path / "base"
    assert make(data, output, "--steps", 1) == 0
    first = weights(output)
    assert make(data, output, "--steps", 2) == 0
    assert weights(output) != first


def test_data_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert make(tmp_path / "none", tmp_path / "base") == 1
    assert capsys.readouterr().err == (
        f"error: --data {tmp_path / 'none'}: is not complete; run scripts/rehearsal_data.py --output {tmp_path / 'none'}\n"
    )
    assert not list(tmp_path.iterdir())
