"""The GPU recipe, built: what every config becomes in NeMo, Megatron and Transformer Engine.

All are built by the functions that train.py calls, over a pretended process group of the config's full size: all of them at a
small width, with the weights of their precision; two DGX H100 configs as the 70B model, on the meta device.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from helpers import ROOT
from llama2_lora.config.settings import Settings
from llama2_lora.config.shell import source
from llama2_lora.forecast import table
from llama2_lora.llama2 import LlamaShape

SEED = 7
SEVENTY = ("DGXH100_1x8x4", "DGXH100_8x8x2")
SMALL = dict(layers=2, hidden=512, ffn=1792, heads=16, vocab=512)  # in place of the 70B's; all of its 8 KV groups
CONFIGS = [path for path in table.configs() if source(path).get("PLATFORM") != "cpu"]


def worker(folder: Path) -> None:
    """Build one config after another in this process, since importing NeMo takes longer than all of them."""
    from helpers.training_runs import _forget_the_run
    from llama2_lora.llama2 import LLAMA2_70B

    launcher = {"RANK": "0", "LOCAL_RANK": "0", "GROUP_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    before = dict(os.environ)
    for path in CONFIGS:
        exported = source(path)
        world, gpus = int(exported["DGXNNODES"]) * int(exported["DGXNGPU"]), exported["DGXNGPU"]
        os.environ.clear()
        os.environ.update(before | exported | launcher | {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": gpus})
        name = path.stem.removeprefix("config_")
        shapes = {name: replace(LLAMA2_70B, **SMALL)} | ({f"{name}.70b": LLAMA2_70B} if name in SEVENTY else {})
        for built, shape in shapes.items():
            (folder / f"{built}.json").write_text(json.dumps(describe_build(shape, meta=shape == LLAMA2_70B)))
            _forget_the_run()


def describe_build(shape: LlamaShape, meta: bool) -> dict:
    """Build everything that train.py builds from the environment; return what the tests look at."""
    import torch
    from lightning.pytorch.trainer.states import TrainerFn
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from helpers.fake_cuda import fake_gpus
    from llama2_lora.training.cpu import capability_for

    settings = Settings.from_env()
    with fake_gpus(capability_for(settings.precision), settings.system.gpus_per_node):
        from megatron.core.tensor_parallel import get_cuda_rng_tracker

        from llama2_lora.training import recipe
        from llama2_lora.training.adapter import adapter_weights
        from llama2_lora.training.built import precisions

        strategy = recipe.build_strategy(settings, SEED, store=FakeStore())
        strategy._process_group_backend = "fake"
        lora = recipe.build_lora(settings, SEED)
        model = recipe.build_model(settings, shape, lora, recipe.build_optimizer(settings), validation_rows=173)
        trainer = recipe.build_trainer(settings, strategy, [lora])
        model.trainer = trainer
        trainer.state.fn = TrainerFn.FITTING
        strategy.connect(model)
        strategy.setup_environment()
        of_the_seed = torch.Generator("cpu").manual_seed(SEED + 2718)  # Megatron's offset for what differs by TP rank
        drawn_from = get_cuda_rng_tracker().get_states()["model-parallel-rng"]
        for callback in trainer.callbacks:
            if callback is not lora:  # adapters are added below, once there is a model
                callback.setup(trainer, model, "fit")
        model.config.init_model_with_meta_device = meta  # for Transformer Engine: no FP8 parameter without a GPU
        with torch.device("meta") if meta else nullcontext():
            model.configure_model()
            lora(model)
        layer = model.module.decoder.layers[0]
        trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        frozen = {
            next(part for part in name.split(".") if part.startswith("linear_")): p
            for name, p in layer.named_parameters()
            if name.endswith(".weight") and not p.requires_grad
        }
        return {
            "seeded": torch.equal(drawn_from, of_the_seed.get_state()),
            "world_size": torch.distributed.get_world_size(),
            "modules": dict(Counter(type(m).__module__.split(".")[0] + "." + type(m).__name__ for m in layer.modules())),
            "weights": {name: type(weight).__name__ for name, weight in frozen.items()},
            "layers": len(model.module.decoder.layers),
            "parameters": sum(p.numel() for p in model.parameters()),
            "trainable": {name: list(p.shape) for name, p in trainable.items()},
            "adapter": [name for name, _ in adapter_weights(model)],
            "config": {key: str(value) for key, value in vars(model.config).items()},
            "optimizer": {key: str(value) for key, value in vars(model.optim.config).items()},
            "schedule": {key: str(value) for key, value in vars(model.optim.lr_scheduler).items()},
            "ddp": {key: str(value) for key, value in vars(strategy.ddp_config).items()},
            "precisions": precisions(model.config),
            "userbuffers": {
                name: type(buffer).__name__
                for callback in trainer.callbacks
                for name, buffer in vars(getattr(callback, "tp_comm_overlap_cfg", None) or SimpleNamespace()).items()
                if buffer is not None and name != "__io__"  # NeMo's record of the arguments
            },
            "callbacks": [type(callback).__name__ for callback in trainer.callbacks],
            "eval_steps": list(trainer.fit_loop.epoch_loop.eval_steps)[:3],
            "max_steps": trainer.max_steps,
        }


@pytest.fixture(scope="module")
def builds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("built")
    environment = {key: value for key, value in os.environ.items() if key in ("PATH", "HOME", "LD_LIBRARY_PATH")}
    environment |= {"PYTHONPATH": f"{ROOT}/src:{ROOT}/tests"}
    done = subprocess.run(
        [sys.executable, __file__, folder], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return folder


# ---- Every config ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_is_built_as_it_says(path: Path, builds: Path) -> None:
    """Its layers, weights, layout, precision and overlap, against what the file exports."""
    exported = source(path)
    built = json.loads((builds / f"{path.stem.removeprefix('config_')}.json").read_text())
    config, modules = built["config"], built["modules"]
    on = {name for name, value in exported.items() if value == "1"}

    nodes, gpus, minibs = (int(exported[name]) for name in ("DGXNNODES", "DGXNGPU", "MINIBS"))
    assert built["seeded"]
    assert built["world_size"] == nodes * gpus
    assert [config[f"{kind}_parallel_size"] for kind in ("tensor_model", "context", "pipeline_model")] == [
        exported[name] for name in ("TP", "CP", "PP")
    ]
    assert (config["sequence_parallel"] == "True") == ("SP" in on)
    assert ("MegatronCommOverlapCallback" in built["callbacks"]) == ("TP_COMM_OVERLAP" in on)
    assert not built["userbuffers"] or "TP_COMM_OVERLAP" in on

    assert modules["megatron.TELayerNormColumnParallelLinear"] == modules["megatron.TERowParallelLinear"] == 2
    assert modules["megatron.TEDotProductAttention"] == 1
    assert modules["llama2_lora.AdaptedLinear"] == 2
    assert len(built["trainable"]) == len(built["adapter"]) == 2 * 2 * SMALL["layers"]
    kept = "NVFP4Tensor" if "FP4_PARAMS" in on else "Float8Tensor" if "FP8_PARAMS" in on else "Parameter"
    assert built["weights"] == dict.fromkeys(("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"), kept)

    low = "nvfp4" if "FP4" in on else "fp8"
    attention = "fp8" if "FP8_DPA" in on else "bfloat16"
    gathered = low if "SP" in on else attention if exported["CP"] != "1" else "bfloat16"
    assert [built["precisions"][f"lowest_numerical_precision_in_{part}"] for part in ("linear", "attn", "comm")] == [
        low,
        attention,
        gathered,
    ]
    if "FP4" not in on:
        names = {"fp8": "FP8_FORMAT", "fp8_amax_history_len": "FP8_AMAX_HISTORY", "fp8_amax_compute_algo": "FP8_AMAX_ALGO"}
        assert {name: config[name] for name in names} == {name: exported[variable] for name, variable in names.items()}
    assert (config["activation_func_fp8_input_store"] == "True") == ("FP8_ACT" in on)

    assert float(built["optimizer"]["lr"]) == float(exported["LR"])
    assert built["max_steps"] == int(exported["MAX_STEPS"])
    replicas = nodes * gpus // (int(exported["TP"]) * int(exported["CP"]))
    assert built["eval_steps"][0] == (replicas * minibs // 8 + 3) * -(-384 // (replicas * minibs))


# ---- The 70B model ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=SEVENTY)
def built(request: pytest.FixtureRequest, builds: Path) -> dict:
    return {"name": request.param} | json.loads((builds / f"{request.param}.70b.json").read_text())


def test_the_model_is_llama2_70b_with_lora_on_two_layers(built: dict) -> None:
    assert built["layers"] == 80
    assert len(built["trainable"]) == len(built["adapter"]) == 320  # A and B, on two linear layers, in 80 layers
    # 4 TP ranks: B of linear_qkv is split over its output, A of linear_proj over its input; the other factors are whole
    assert all(".adapter." in name for name in built["trainable"])
    whole = 0
    for name, shape in built["trainable"].items():
        rows, columns = shape
        assert "linear_qkv" in name or "linear_proj" in name
        split = "linear_qkv.adapter.linear_out" in name or "linear_proj.adapter.linear_in" in name
        whole += rows * columns * (4 if split else 1)
    assert whole == 44_564_480


def test_transformer_engine_modules_are_in_place(built: dict) -> None:
    modules = built["modules"]
    assert modules["megatron.TELayerNormColumnParallelLinear"] == 2  # linear_qkv and linear_fc1 with their norms
    assert modules["megatron.TERowParallelLinear"] == 2  # linear_proj and linear_fc2
    assert modules["megatron.TEDotProductAttention"] == 1
    assert modules["llama2_lora.AdaptedLinear"] == 2


def test_fp8_is_delayed_scaling_as_the_config_says(built: dict) -> None:
    config = built["config"]
    expected = {
        "bf16": "True",
        "fp8": "hybrid",
        "fp8_recipe": "delayed",
        "fp8_amax_history_len": "32",
        "fp8_amax_compute_algo": "max",
        "fp8_dot_product_attention": "True",
        "fp8_param": "True",
        "activation_func_fp8_input_store": "False",  # the account says that both fit without
        "recompute_granularity": "None",
        "cpu_offloading": "False",
        "tp_comm_overlap": "True",
        "tp_only_amax_red": "True",
        "tp_comm_bulk_wgrad": "False",
        "tp_comm_bulk_dgrad": "False",
        "tp_comm_overlap_rs_dgrad": "True",
        "tp_comm_bootstrap_backend": "nccl",
        "cross_entropy_loss_fusion": "True",
    }
    assert {key: config[key] for key in expected} == expected
    assert built["precisions"] == {
        "lowest_numerical_precision_in_linear": "fp8",
        "lowest_numerical_precision_in_attn": "fp8",
        "lowest_numerical_precision_in_comm": "fp8",
    }


def test_layout(built: dict) -> None:
    world_size, cp = {"DGXH100_1x8x4": (8, "1"), "DGXH100_8x8x2": (64, "2")}[built["name"]]
    config = built["config"]
    assert built["world_size"] == world_size
    assert (config["tensor_model_parallel_size"], config["pipeline_model_parallel_size"]) == ("4", "1")
    assert config["context_parallel_size"] == cp
    assert config["sequence_parallel"] == "True"
    assert "MegatronCommOverlapCallback" in built["callbacks"]


def test_userbuffers_overlap_nothing_that_needs_a_weight_gradient(built: dict) -> None:
    ring, pipeline = "RingExchangeOverlapCfg", "PipelineOverlapCfg"
    assert built["userbuffers"] == {
        "qkv_fprop": ring,
        "fc1_fprop": ring,
        "proj_dgrad": ring,
        "fc2_dgrad": ring,
        "proj_fprop": pipeline,
        "fc2_fprop": pipeline,
        "qkv_dgrad": ring,
        "fc1_dgrad": ring,
    }


def test_optimizer_and_schedule(built: dict) -> None:
    max_steps, eval_steps = {"DGXH100_1x8x4": (800, [192, 240, 288]), "DGXH100_8x8x2": (1024, [120, 144, 168])}[built["name"]]
    optimizer = built["optimizer"]
    expected = {"optimizer": "adam", "lr": "0.0004", "weight_decay": "0.0001", "clip_grad": "0.3", "adam_beta2": "0.999"}
    expected |= {"adam_eps": "1e-08", "use_distributed_optimizer": "True", "bf16": "True", "overlap_param_gather": "False"}
    assert {key: optimizer[key] for key in expected} == expected
    assert built["ddp"]["use_distributed_optimizer"] == "True"
    assert (built["schedule"]["constant_steps"], built["schedule"]["min_lr"]) == ("0", "0.0")
    assert built["max_steps"] == max_steps
    assert built["eval_steps"] == eval_steps


if __name__ == "__main__":
    worker(Path(sys.argv[1]))
