"""convert_model.py: what NeMo loads from its output equals the source; bad sources and kills leave nothing behind."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from helpers import ROOT
from helpers.hub_server import TOKEN, HubServer
from helpers.nemo_model import launch
from helpers.tiny_llama import TINY, hf_config, save, weights, write_llama
from llama2_lora.llama2 import chunks
from llama2_lora.weights.checkpoint import check_checkpoint, read_shape
from llama2_lora.weights.convert import convert
from llama2_lora.weights.huggingface import HFModel

SCRIPT = ROOT / "scripts/convert_model.py"
TOLERANCE = 1e-5
FORMATS = ("zarr", "torch_dist")
MODELS = {
    "fp32": {},
    "bf16": {"dtype": "bfloat16"},
    "fp16_sharded": {"dtype": "float16", "shards": 3},
    "bin": {"shards": 2, "bin": True},
    "tied": {"shape": dataclasses.replace(TINY, tied=True, vocab=30, kv_groups=8)},
}


def script(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, SCRIPT, *map(str, arguments)], capture_output=True, text=True, env=os.environ | environment
    )


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# What NeMo loads ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Every model in both formats, and the logits that transformers computes (fp32)."""
    import torch
    from transformers import LlamaForCausalLM

    folder = tmp_path_factory.mktemp("models")
    tokens = np.random.default_rng(0).integers(0, 30, (2, TINY.max_positions))
    np.save(folder / "tokens.npy", tokens)
    for name, options in MODELS.items():
        write_llama(folder / name, **options)
        for format in FORMATS:
            source = HFModel(folder / name)
            source.dtype = "F32"  # the CPU's
            convert(source, folder / f"{name}_{format}", format)
        with torch.no_grad():
            model = LlamaForCausalLM.from_pretrained(folder / name, dtype=torch.float32).eval()
            np.save(folder / f"{name}.npy", model(torch.from_numpy(tokens)).logits.numpy())
    return folder


def job(folder: Path, name: str, format: str, tp: int = 1, pp: int = 1) -> dict:
    found = {"checkpoint": folder / f"{name}_{format}", "tokens": folder / "tokens.npy", "tp": tp, "pp": pp}
    return found | {"logits": folder / f"{name}_{format}_{tp}_{pp}.npy", "context": folder / f"{name}_{format}.json"}


@pytest.fixture(scope="module")
def nemo(models):
    jobs = [job(models, name, format) for name in MODELS for format in FORMATS]
    layouts = [(2, 1), (1, 2)]
    launch(jobs + [job(models, n, f, *layout) for n in ("fp32", "tied") for f in FORMATS for layout in layouts], models)
    return models


def assert_equal_logits(folder: Path, name: str, format: str, tp: int, pp: int) -> None:
    expected = np.load(folder / f"{name}.npy")
    assert expected.std() > 0.5  # else anything would be close
    assert np.abs(np.load(folder / f"{name}_{format}_{tp}_{pp}.npy") - expected).max() < TOLERANCE


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", MODELS)
def test_nemo_computes_what_transformers_computes(nemo, name, format):
    assert_equal_logits(nemo, name, format, 1, 1)


@pytest.mark.parametrize("layout", [(2, 1), (1, 2)], ids=["TP2", "PP2"])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", ["fp32", "tied"])
def test_two_ranks_load_their_shares(nemo, name, format, layout):
    assert_equal_logits(nemo, name, format, *layout)


def test_nemo_builds_model_and_tokenizer_from_the_context(nemo):
    assert json.loads((nemo / "bf16_zarr.json").read_text()) == {
        "num_layers": "4",
        "hidden_size": "32",
        "ffn_hidden_size": "48",
        "num_query_groups": "2",
        "vocab_size": "72",
        "params_dtype": "torch.float32",
        "bf16": "False",
        "tokenizer": 72,
        "ids": [5, 7],
    }


def test_shards_and_bin_files_give_the_same_weights(models, tmp_path):
    write_llama(tmp_path / "shards", shards=4)
    convert(HFModel(tmp_path / "shards"), tmp_path / "out", "zarr")
    assert files(tmp_path / "out/weights").keys() == files(models / "fp32_zarr/weights").keys()
    for name, content in files(tmp_path / "out/weights").items():
        if not name.endswith(".pt"):  # zip files with a time
            assert (
                content
                == (models / "fp32_zarr/weights" / name).read_bytes()
                == (models / "bin_zarr/weights" / name).read_bytes()
            )


@pytest.mark.parametrize("format", FORMATS)
def test_transformer_engine_layers_load_it(tmp_path, format):
    """Every key is found, every parameter is the source's."""
    shape = dataclasses.replace(TINY, layers=2, hidden=64, ffn=96)
    source = HFModel(write_llama(tmp_path / "hf", shape))
    convert(source, tmp_path / "out", format)
    tests = SCRIPT.parents[1] / "tests"
    environment = os.environ | {"PYTHONPATH": f"{tests}:{tests.parent / 'src'}"}
    command = [sys.executable, tests / "helpers/nemo_te.py", tmp_path / "out", tmp_path / "loaded.npz"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    loaded = np.load(tmp_path / "loaded.npz")
    expected: dict[str, bytes] = {}
    for chunk in chunks(shape):
        name = chunk.stack.name
        if chunk.stack.stacked:
            name = name.replace("layers.", f"layers.{chunk.place[0]}.")
        expected[name] = expected.get(name, b"") + b"".join(source.read_all(chunk.blocks))
    assert {name: loaded[name].tobytes() for name in loaded} == expected


# The command --------------------------------------------------------------------------------------------------------


def test_tree_is_the_readmes(tmp_path):
    write_llama(tmp_path / "hf", dtype="bfloat16")
    done = script("--source", tmp_path / "hf", "--output_path", tmp_path / "data/model", "--verify")
    assert done.returncode == 0, done.stderr
    assert "every tensor equals the source's" in done.stdout
    model = tmp_path / "data/model"
    assert tree_of(model) == readme_tree("model")
    header = json.loads((model / "weights/module.decoder.layers.mlp.linear_fc1.weight/.zarray").read_text())
    assert (header["dtype"], header["shape"], header["chunks"]) == ("bfloat16", [4, 96, 32], [1, 48, 32])


def tree_of(folder, depth=2):
    """Paths below a folder, down to what the README shows."""
    below = (path.relative_to(folder) for path in folder.rglob("*"))
    return sorted(str(path) for path in below if len(path.parts) <= depth and path.parent.name != "nemo_tokenizer")


def readme_tree(name):
    """The paths below `name` in the README's drawing of /data."""
    lines = (ROOT / "README.md").read_text().split("\n/data\n", 1)[1].split("```")[0].splitlines()
    paths, above = [], []
    for line in lines:
        depth, entry = (line.index("── ") - 1) // 4, line.split("── ")[1].split()[0]
        above = [*above[:depth], entry]
        if above[0] == name and depth:
            paths.append("/".join(above[1:]))
    return sorted(paths)


@pytest.mark.parametrize(
    ("stored", "options", "written"),
    [("float16", (), "BF16"), ("float32", (), "F32"), ("bfloat16", ("--dtype", "fp32"), "F32")],
)
def test_dtype_is_trainings(tmp_path, stored, options, written):
    import torch

    write_llama(tmp_path / "hf", dtype=stored)
    done = script("--source", tmp_path / "hf", "--output_path", tmp_path / "out", "--verify", *options)
    assert done.returncode == 0, done.stderr
    check_checkpoint(tmp_path / "out", TINY, written)
    dtype = {"BF16": torch.bfloat16, "F32": torch.float32}[written]
    expected = weights(TINY, stored)["lm_head.weight"].to(dtype).view(torch.uint8).numpy().tobytes()
    assert (tmp_path / "out/weights/module.output_layer.weight/0.0").read_bytes() == expected


def test_second_call_does_nothing_until_the_source_changes(tmp_path):
    source, output = tmp_path / "hf", tmp_path / "out"
    write_llama(source)
    arguments = ("--source", source, "--output_path", output)
    assert "written" in script(*arguments).stdout
    again = script(*arguments)
    assert (again.returncode, "is up to date" in again.stdout) == (0, True)
    changed = weights(TINY)
    changed["model.norm.weight"] += 1
    save(changed, source / "model.safetensors")
    done = script(*arguments, "--verify")
    assert done.returncode == 0, done.stderr
    assert "written" in done.stdout
    assert sorted(path.name for path in output.iterdir()) == ["context", "weights"]


def test_checkpoint_of_other_origin_is_left_alone(tmp_path):
    write_llama(tmp_path / "a")
    write_llama(tmp_path / "b")
    assert script("--source", tmp_path / "a", "--output_path", tmp_path / "out").returncode == 0
    before = files(tmp_path / "out")
    done = script("--source", tmp_path / "b", "--output_path", tmp_path / "out")
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert "remove it" in done.stderr
    assert files(tmp_path / "out") == before


@pytest.mark.parametrize("format", FORMATS)
def test_verify_names_a_damaged_tensor(tmp_path, format):
    write_llama(tmp_path / "hf")
    arguments = ("--source", tmp_path / "hf", "--output_path", tmp_path / "out", "--format", format, "--verify")
    assert script(*arguments).returncode == 0
    biggest = max((tmp_path / "out/weights").rglob("*"), key=lambda path: path.is_file() and path.stat().st_size)
    content = bytearray(biggest.read_bytes())
    content[len(content) // 2] ^= 1
    biggest.write_bytes(content)
    done = script(*arguments)
    assert done.returncode == 1
    assert "weight [" in done.stderr
    assert "convert it again" in done.stderr


@pytest.mark.parametrize("format", FORMATS)
def test_two_conversions_give_the_same_bytes(tmp_path, format):
    source = write_llama(tmp_path / "hf")
    made = []
    for name, seed in (("first", "1"), ("second", "2")):
        done = script("--source", source, "--output_path", tmp_path / name, "--format", format, PYTHONHASHSEED=seed)
        assert done.returncode == 0, done.stderr
        made.append(files(tmp_path / name))
        time.sleep(2)  # the resolution of times in zip files
    assert made[0] == made[1]


@pytest.mark.parametrize("format", FORMATS)
def test_kill_leaves_nothing_that_looks_complete_and_the_next_call_goes_on(tmp_path, format):
    shape = dataclasses.replace(TINY, layers=40)
    write_llama(tmp_path / "hf", shape)
    command = [sys.executable, SCRIPT, "--source", tmp_path / "hf", "--output_path", tmp_path / "out", "--format", format]
    process = subprocess.Popen(command)
    weights = tmp_path / "out/.partial/weights"
    while process.poll() is None and sum(1 for path in weights.rglob("*") if path.suffix != ".zarray") < 100:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it was done before the signal came"
    assert not (tmp_path / "out/weights").exists()
    with pytest.raises(ValueError, match="does not exist"):
        read_shape(tmp_path / "out")
    begun = {path: path.stat().st_mtime_ns for path in weights.rglob("[0-9]*.0*")} | {
        path: path.stat().st_mtime_ns for path in weights.glob("__0_*")
    }
    assert begun
    done = subprocess.run([*command, "--verify"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    check_checkpoint(tmp_path / "out", shape)
    kept = [(tmp_path / "out/weights" / path.relative_to(weights)).stat().st_mtime_ns for path in begun]
    assert kept == list(begun.values())  # pieces that were there were not written again
    assert not [path for path in (tmp_path / "out").rglob("*") if ".partial" in path.name]


def test_a_quota_leaves_nothing_and_the_next_call_converts(tmp_path):
    """A file that may not grow further, as on a full disk: one line, and no folder that looks complete."""
    write_llama(tmp_path / "hf", dtype="float32")
    arguments = ["--source", str(tmp_path / "hf"), "--output_path", str(tmp_path / "out")]
    limited = ["bash", "-c", 'ulimit -f 4 && exec "$@"', "bash", sys.executable, SCRIPT, *arguments]
    done = subprocess.run(limited, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.strip().endswith("File too large")
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out/weights").exists()
    assert script(*arguments).returncode == 0


def test_memory_does_not_grow_with_the_model(tmp_path):
    """Sparse files: 2 and 12 layers of 32 MiB each."""
    peaks = {}
    for format in FORMATS:
        for layers in (2, 12):
            source = tmp_path / f"{layers}"
            if not source.exists():
                write_sparse(source, dataclasses.replace(TINY, layers=layers, hidden=1024, ffn=4096))
            peaks[format, layers] = peak_mib("--source", source, "--output_path", tmp_path / "out", "--format", format)
            shutil.rmtree(tmp_path / "out")
    for format in FORMATS:
        assert peaks[format, 12] < peaks[format, 2] + 24, peaks
    assert peaks["zarr", 12] < 150, peaks


def write_sparse(folder: Path, shape) -> None:
    """A model of zeros that takes no room on the disk."""
    write_llama(folder, TINY)
    (folder / "config.json").write_text(json.dumps(hf_config(shape, "bfloat16")))
    from llama2_lora.llama2 import hf_tensors

    header, end = {}, 0
    for name, dims in hf_tensors(shape).items():
        start, end = end, end + int(np.prod(dims)) * 2
        header[name] = {"dtype": "BF16", "shape": dims, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def peak_mib(*arguments: object) -> int:
    """Peak memory of the command. (getrusage would count what this process had when it was forked.)"""
    code = (
        "import runpy, sys, re\n"
        "sys.argv = sys.argv[1:]\n"
        "try:\n    runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as end:\n    assert not end.code\n"
        "print(re.search(r'VmHWM:\\s+(\\d+) kB', open('/proc/self/status').read()).group(1))"
    )
    command = [sys.executable, "-c", code, SCRIPT, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1]) // 1024


def test_repository_in_the_hubs_cache_is_used_offline(tmp_path):
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "home/hub/models--owner--llama"
    write_llama(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(commit)
    environment = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    done = script("--source", "owner/llama", "--output_path", tmp_path / "out", **environment)
    assert done.returncode == 0, done.stderr
    assert read_shape(tmp_path / "out") == TINY
    missing = script("--source", "owner/other", "--output_path", tmp_path / "none", **environment)
    assert missing.returncode == 1
    assert missing.stderr.startswith("error: ")
    assert len(missing.stderr.splitlines()) == 1
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("place", ["", "Llama-2-70b-hf", "meta-llama/Llama-2-70B-hf"])
def test_hf_home_may_be_the_folder_of_the_checkpoint_itself(tmp_path, place):
    """The command as it is documented: no --source."""
    write_llama(tmp_path / "home" / place)
    environment = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    done = script("--output_path", tmp_path / "out", **environment)
    assert done.returncode == 0, done.stderr
    assert read_shape(tmp_path / "out") == TINY


@pytest.mark.parametrize("spelling", ["70b", "70B"])
def test_llama_2_70b_is_found_under_both_spellings(tmp_path, spelling):
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / f"home/hub/models--meta-llama--Llama-2-{spelling}-hf"
    write_llama(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(commit)
    environment = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    for number, arguments in enumerate(((), ("--source", "meta-llama/Llama-2-70B-hf"))):
        done = script("--output_path", tmp_path / f"out{number}", *arguments, **environment)
        assert done.returncode == 0, done.stderr
        assert f"--revision {commit}\n" in done.stdout


def test_repository_is_downloaded_once(tmp_path):
    repository = files(write_llama(tmp_path / "hf", shards=2)) | {
        "pytorch_model.bin": b"not needed",
        "LICENSE.txt": b"nor this",
    }
    with HubServer("owner/llama", repository) as server:
        server.dropped["model-00001-of-00002.safetensors"] = 1
        environment = server.environment(tmp_path / "home")
        arguments = ("--source", "owner/llama", "--output_path", tmp_path / "out", "--verify")
        done = script(*arguments, **environment)
        assert done.returncode == 0, done.stderr
        assert f"downloading owner/llama at {server.commit}" in done.stdout
        assert {"pytorch_model.bin", "LICENSE.txt"}.isdisjoint(server.sent)
        sent = dict(server.sent)
        again = script(*arguments, **environment)
        assert (again.returncode, "is up to date" in again.stdout) == (0, True), again.stderr
        assert dict(server.sent) == sent


def test_gated_repository_says_what_to_do(tmp_path):
    with HubServer("owner/llama", files(write_llama(tmp_path / "hf")), gated=True) as server:
        arguments = ("--source", "owner/llama", "--output_path", tmp_path / "out")
        done = script(*arguments, **server.environment(tmp_path / "home"))
        assert (done.returncode, len(done.stderr.splitlines())) == (1, 1), done.stderr
        assert "HF_TOKEN" in done.stderr
        assert not (tmp_path / "out").exists()
        done = script(*arguments, **server.environment(tmp_path / "home", HF_TOKEN=TOKEN))
        assert done.returncode == 0, done.stderr
        assert TOKEN not in done.stdout + done.stderr


# Sources that are refused -------------------------------------------------------------------------------------------


def without(name):
    def change(folder):
        tensors = weights(TINY)
        del tensors[name]
        save(tensors, folder / "model.safetensors")

    return change


def with_extra(folder):
    tensors = weights(TINY)
    save(tensors | {"model.layers.0.self_attn.q_proj.bias": tensors["model.norm.weight"].clone()}, folder / "model.safetensors")


def with_two_dtypes(folder):
    tensors = weights(TINY)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].half()
    save(tensors, folder / "model.safetensors")


def with_config(**changes):
    return lambda folder: (folder / "config.json").write_text(json.dumps(hf_config(TINY) | changes))


def cut_off(folder):
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(10_000)


REFUSED = {
    "missing tensor": (without("model.layers.2.mlp.up_proj.weight"), "model.layers.2.mlp.up_proj.weight is missing"),
    "missing output layer": (without("lm_head.weight"), "lm_head.weight is missing"),
    "extra tensor": (with_extra, "model.layers.0.self_attn.q_proj.bias is no tensor of this model"),
    "wrong hidden size": (with_config(hidden_size=64), "has the shape (72, 32), config.json asks for (72, 64)"),
    "too few layers": (with_config(num_hidden_layers=3), "model.layers.3.input_layernorm.weight is no tensor"),
    "two dtypes": (with_two_dtypes, "weights are F16, F32"),
    "other architecture": (with_config(model_type="mixtral"), "model_type is mixtral, must be llama"),
    "cut off": (cut_off, "its header promises"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "has no weights"),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "has no tokenizer"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "config.json does not exist"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_sources_are_refused_by_name(tmp_path, case):
    damage, message = REFUSED[case]
    write_llama(tmp_path / "hf")
    damage(tmp_path / "hf")
    with pytest.raises(ValueError) as error:  # noqa: PT011 (the message is compared below)
        HFModel(tmp_path / "hf")
    assert message in str(error.value)


def test_missing_shard_is_named(tmp_path):
    write_llama(tmp_path / "hf", shards=3)
    (tmp_path / "hf/model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ValueError, match="model-00002-of-00003"):
        HFModel(tmp_path / "hf")


def test_damaged_bin_file_is_named(tmp_path):
    write_llama(tmp_path / "hf", bin=True)
    (tmp_path / "hf/pytorch_model.bin").write_bytes(b"x" * 1000)
    with pytest.raises(ValueError, match=r"pytorch_model\.bin is damaged"):
        HFModel(tmp_path / "hf")


def test_command_refuses_in_one_line_and_makes_nothing(tmp_path):
    write_llama(tmp_path / "hf")
    cut_off(tmp_path / "hf")
    done = script("--source", tmp_path / "hf", "--output_path", tmp_path / "out")
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_not_there_is_no_repository(tmp_path):
    done = script("--output_path", tmp_path / "out", "--source", tmp_path / "nope")
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {tmp_path}/nope: no such folder; a source is a folder, or owner/name")
    assert not (tmp_path / "out").exists()


def test_computed_buffers_and_a_second_copy_of_a_tied_embedding_are_ignored(tmp_path):
    import torch

    shape = dataclasses.replace(TINY, tied=True)
    write_llama(tmp_path / "hf", shape)
    tensors = weights(shape)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(2)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save(tensors, tmp_path / "hf/model.safetensors")
    assert convert(HFModel(tmp_path / "hf"), tmp_path / "out", "zarr")
    assert not (tmp_path / "out/weights/module.output_layer.weight").exists()
