"""What train.py asks of a checkpoint folder, and the adapter's folder."""

from __future__ import annotations

import collections
import dataclasses
import io
import json
import pickle
import shutil

import numpy as np
import pytest
import yaml

from helpers.tiny_llama import TINY, write_llama
from llama2_lora.llama2 import adapter_shapes
from llama2_lora.weights.checkpoint import check_checkpoint, read_adapter, read_shape, write_adapter
from llama2_lora.weights.convert import convert, verify
from llama2_lora.weights.huggingface import HFModel


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    source = HFModel(write_llama(folder / "hf"))
    for format in ("zarr", "torch_dist"):
        convert(source, folder / format, format)
    return folder


@pytest.fixture(params=["zarr", "torch_dist"])
def checkpoint(converted, tmp_path, request):
    return shutil.copytree(converted / request.param, tmp_path / request.param)


@pytest.fixture
def zarr(converted, tmp_path):
    return shutil.copytree(converted / "zarr", tmp_path / "zarr")


def test_shape_is_read_back(checkpoint):
    assert read_shape(checkpoint) == TINY
    check_checkpoint(checkpoint, TINY)


def test_vocabulary_comes_from_the_weights_where_the_context_leaves_it_out(zarr):
    """As in contexts that NeMo wrote from a tokenizer."""
    path = zarr / "context/model.yaml"
    model = yaml.safe_load(path.read_text())
    model["config"]["vocab_size"] = None
    path.write_text(yaml.safe_dump(model))
    assert read_shape(zarr) == TINY
    shutil.rmtree(zarr / "weights")
    with pytest.raises(ValueError, match="vocabulary"):
        read_shape(zarr)


def test_folder_that_is_no_checkpoint(tmp_path):
    with pytest.raises(ValueError, match="no NeMo checkpoint"):
        read_shape(tmp_path)
    (tmp_path / "context").mkdir()
    (tmp_path / "context/model.yaml").write_text("config: {num_layers: 3}\n")
    with pytest.raises(ValueError, match="does not describe a Llama"):
        read_shape(tmp_path)


@pytest.mark.parametrize("name", ["context/io.json", "context/nemo_tokenizer", "weights/common.pt", "weights/metadata.json"])
def test_missing_files_are_named(checkpoint, name):
    path = checkpoint / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(ValueError, match=name):
        check_checkpoint(checkpoint, TINY)


def test_missing_and_misshaped_tensors_are_named(zarr):
    weights = zarr / "weights"
    shutil.rmtree(weights / "module.output_layer.weight")
    (weights / "module.decoder.layers.mlp.linear_fc1.weight/3.1.0").unlink()  # zarr would read zeros
    header = weights / "module.decoder.final_layernorm.weight/.zarray"
    header.write_text(json.dumps(json.loads(header.read_text()) | {"shape": [31]}))
    with pytest.raises(ValueError, match=r"output_layer\.weight is missing") as error:
        check_checkpoint(zarr, TINY)
    assert "linear_fc1.weight lacks 1 of 8 chunks, such as 3.1.0" in str(error.value)
    assert "final_layernorm.weight has the shape (31,)" in str(error.value)
    assert "convert_model.py" in str(error.value)


def test_dtype_that_training_would_misread_is_named(zarr):
    check_checkpoint(zarr, TINY, "F32")
    with pytest.raises(ValueError, match=r"is <f4, training holds it in bfloat16 \(--dtype\)"):
        check_checkpoint(zarr, TINY, "BF16")


def random_adapter(rank: int = 3) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=dims).astype(np.float32) for name, dims in adapter_shapes(TINY, rank).items()}


def test_adapter_comes_back_as_it_was(tmp_path):
    arrays = random_adapter()
    write_adapter(tmp_path / "adapter", arrays, TINY, 3, 6)
    found, shape, rank, alpha = read_adapter(tmp_path / "adapter")
    assert (shape, rank, alpha) == (TINY, 3, 6)
    assert found.keys() == arrays.keys()
    assert all((found[name] == arrays[name]).all() for name in arrays)


def test_adapter_of_torch_tensors(tmp_path):
    import torch

    write_adapter(tmp_path / "a", {name: torch.from_numpy(x) for name, x in random_adapter().items()}, TINY, 3, 6)
    assert read_adapter(tmp_path / "a")[0].keys() == random_adapter().keys()


def test_wrong_adapter_is_refused_and_the_old_one_stays(tmp_path):
    arrays = random_adapter()
    write_adapter(tmp_path / "adapter", arrays, TINY, 3, 6)
    first, second, *_ = arrays
    with pytest.raises(ValueError, match=f"{first} is missing"):
        write_adapter(tmp_path / "adapter", {k: v for k, v in arrays.items() if k != first}, TINY, 3, 6)
    with pytest.raises(ValueError, match=f"{second} has the shape"):
        write_adapter(tmp_path / "adapter", arrays | {second: arrays[second][:-1]}, TINY, 3, 6)
    assert read_adapter(tmp_path / "adapter")[2] == 3
    write_adapter(tmp_path / "adapter", random_adapter(2), TINY, 2, 6)  # a later run replaces it
    assert read_adapter(tmp_path / "adapter")[2] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_damaged_or_missing_adapter(tmp_path):
    with pytest.raises(ValueError, match="SAVE_ADAPTER"):
        read_adapter(tmp_path)
    write_adapter(tmp_path / "adapter", random_adapter(), TINY, 3, 6)
    file = tmp_path / "adapter/adapter.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(ValueError, match="damaged"):
        read_adapter(tmp_path / "adapter")


# Pickles: training and --verify would run them ------------------------------------------------------------------------

RAN: list[str] = []


class Evil:
    def __reduce__(self):
        return RAN.append, ("code ran",)


def torch_bytes(value):
    import torch

    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def evil_index(checkpoint):
    (checkpoint / "weights/.metadata").write_bytes(pickle.dumps({"state_dict_metadata": Evil()}))


def evil_object_in_the_index(checkpoint):
    """torch would load the objects of this format with weights_only=False."""
    import torch

    index = pickle.loads((checkpoint / "weights/.metadata").read_bytes())
    data = torch_bytes([Evil()])
    (checkpoint / "weights/evil.distcp").write_bytes(data)
    key = next(key for key in index.storage_data if "_extra_state" in key.fqn)
    index.storage_data[key] = torch.distributed.checkpoint.filesystem._StorageInfo("evil.distcp", 0, len(data))
    (checkpoint / "weights/.metadata").write_bytes(pickle.dumps(index))


def evil_common(checkpoint):
    (checkpoint / "weights/common.pt").write_bytes(torch_bytes({"a": Evil()}))


def evil_common_that_is_no_zip_file_at_its_start(checkpoint):
    """By the first bytes torch.load takes it for one pickle; zipfile finds the archive at its end."""
    (checkpoint / "weights/common.pt").write_bytes(pickle.dumps(Evil()) + torch_bytes({}))


def evil_bytes_that_transformer_engine_would_unpickle(checkpoint):
    import torch

    state = torch.frombuffer(bytearray(pickle.dumps(Evil())), dtype=torch.uint8)
    path = checkpoint / "weights/module.decoder.final_layernorm._extra_state/shard_0_1.pt"
    path.write_bytes(torch_bytes(state))


@pytest.mark.parametrize(
    ("format", "damage"),
    [
        ("torch_dist", evil_index),
        ("torch_dist", evil_common),
        ("zarr", evil_common),
        ("zarr", evil_common_that_is_no_zip_file_at_its_start),
    ],
)
def test_a_pickle_that_would_run_code_is_refused_before_anything_loads_it(converted, tmp_path, format, damage):
    checkpoint = shutil.copytree(converted / format, tmp_path / format)
    damage(checkpoint)
    with pytest.raises(ValueError, match=r"asks for '(builtins|__builtin__)\.getattr'|is no file of torch\.save") as refusal:
        check_checkpoint(checkpoint, TINY)
    assert "\n" not in str(refusal.value)
    with pytest.raises(ValueError, match=r"asks for|is no file"):
        verify(HFModel(converted / "hf"), checkpoint)
    assert RAN == []


@pytest.mark.parametrize(
    ("format", "change"),
    [("torch_dist", evil_object_in_the_index), ("zarr", evil_bytes_that_transformer_engine_would_unpickle)],
)
def test_a_strangers_fp8_states_are_left_alone(converted, tmp_path, format, change):
    """A checkpoint of an FP8 run has classes of its own library there. Nothing here loads them, so they refuse nothing."""
    checkpoint = shutil.copytree(converted / format, tmp_path / format)
    change(checkpoint)
    check_checkpoint(checkpoint, TINY)
    verify(HFModel(converted / "hf"), checkpoint)
    assert RAN == []


def test_a_common_file_of_tensors_and_plain_values_is_accepted(converted, tmp_path):
    import torch

    checkpoint = shutil.copytree(converted / "zarr", tmp_path / "zarr")
    common = {"epoch": 1, "dtype": torch.bfloat16, "t": torch.ones(3), "o": collections.OrderedDict(a=1), "n": [None, "x"]}
    (checkpoint / "weights/common.pt").write_bytes(torch_bytes(common))
    check_checkpoint(checkpoint, TINY)


def test_chunks_are_known_by_name_and_size(zarr):
    array = zarr / "weights/module.decoder.layers.mlp.linear_fc1.weight"
    (array / "0.0.0").rename(array / "0_0_0")  # zarr would read zeros
    with pytest.raises(ValueError, match=r"lacks 1 of 8 chunks, such as 0\.0\.0, and has '0_0_0' instead"):
        check_checkpoint(zarr, TINY)
    (array / "0_0_0").rename(array / "0.0.0")
    (array / "0.0.0").write_bytes((array / "0.0.0").read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"linear_fc1\.weight/0\.0\.0 has 6143 bytes, must have 6144"):
        check_checkpoint(zarr, TINY)


def test_a_torch_dist_checkpoint_is_looked_through_before_torch_is_there(converted, tmp_path):
    checkpoint = shutil.copytree(converted / "torch_dist", tmp_path / "torch_dist")
    with pytest.raises(ValueError, match=r"is torch\.float32, training holds it in torch\.bfloat16"):
        check_checkpoint(checkpoint, TINY, "BF16")
    with pytest.raises(ValueError, match="the context asks for"):
        check_checkpoint(checkpoint, dataclasses.replace(TINY, vocab=64))
    (checkpoint / "weights/__0_3.distcp").write_bytes(b"cut")
    (checkpoint / "weights/__0_4.distcp").unlink()
    with pytest.raises(ValueError, match=r"__0_3\.distcp has 3 bytes, of which .*__0_4\.distcp, of .* is missing"):
        check_checkpoint(checkpoint, TINY)
