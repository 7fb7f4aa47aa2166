"""The GPU recipe, built on the meta device: what both DGX H100 configs become in NeMo, Megatron and Transformer Engine.

Each config is built once, in a process of its own, by the functions that train.py calls, over a pretended process group of
the config's full size.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

from helpers import ROOT

CONFIGS = ("DGXH100_1x8x4", "DGXH100_8x8x2")


def describe_build(folder: Path) -> dict:
    """Build everything that train.py builds from the environment; return what the tests look at."""
    import torch
    from lightning.pytorch.trainer.states import TrainerFn
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from helpers.fake_cuda import fake_h100
    from llama2_lora.config.settings import Settings
    from llama2_lora.llama2 import LLAMA2_70B

    settings = Settings.from_env()
    with fake_h100():
        from llama2_lora.training import recipe
        from llama2_lora.training.adapter import adapter_weights
        from llama2_lora.training.callback import precisions

        strategy = recipe.build_strategy(settings, seed=1, store=FakeStore())
        strategy._process_group_backend = "fake"
        lora = recipe.build_lora(settings, seed=1)
        model = recipe.build_model(settings, LLAMA2_70B, lora, recipe.build_optimizer(settings), validation_rows=173)
        trainer = recipe.build_trainer(settings, strategy, [lora])
        model.trainer = trainer
        trainer.state.fn = TrainerFn.FITTING
        strategy.connect(model)
        strategy.setup_environment()
        for callback in trainer.callbacks:
            if callback is not lora:  # adapters are added below, once there is a model
                callback.setup(trainer, model, "fit")
        model.config.init_model_with_meta_device = True  # for Transformer Engine: no FP8 parameter without a GPU
        with torch.device("meta"):
            model.configure_model()
            lora(model)
        layer = model.module.decoder.layers[0]
        trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        group = torch.distributed.get_world_size()
        return {
            "world_size": group,
            "modules": dict(Counter(type(m).__module__.split(".")[0] + "." + type(m).__name__ for m in layer.modules())),
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
                if buffer is not None
            },
            "callbacks": [type(callback).__name__ for callback in trainer.callbacks],
            "eval_steps": list(trainer.fit_loop.epoch_loop.eval_steps)[:3],
            "max_steps": trainer.max_steps,
        }


@pytest.fixture(scope="module", params=CONFIGS)
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict:
    folder = tmp_path_factory.mktemp(request.param)
    nodes, gpus, _ = map(int, request.param.rsplit("_", 1)[1].split("x"))
    script = f'source config_{request.param}.sh && exec "$0" tests/training/test_recipe.py "$1"'
    environment = {key: value for key, value in os.environ.items() if key in ("PATH", "HOME", "LD_LIBRARY_PATH")}
    environment |= {"PYTHONPATH": f"{ROOT}/src:{ROOT}/tests"}
    environment |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(nodes * gpus), "LOCAL_WORLD_SIZE": str(gpus)}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "GROUP_RANK": "0"}
    done = subprocess.run(
        ["bash", "-c", script, sys.executable, folder], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return {"name": request.param} | json.loads((folder / "built.json").read_text())


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
    Path(sys.argv[1], "built.json").write_text(json.dumps(describe_build(Path(sys.argv[1]))))
