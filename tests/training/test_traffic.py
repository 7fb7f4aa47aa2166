"""What the adapter of one layer moves between the tensor-parallel ranks, forward and backward, counted and against NeMo's.

A launched copy of this file wraps torch.distributed's collectives before any library binds them. S tokens, H features, r rank:
NeMo's adapter moves activations of full width, [S, H]; ours [S, r]. At H = 8192, r = 16 and TP 4 ours moves 64 S elements,
NeMo's 16,448 S, and 1,088 S with the all-to-all of published runs.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from helpers import ROOT
from helpers.training_runs import clean_environment

S, H, RANK, TP = 32, 512, 16, 2
GROUPS = 2  # key/value heads
SIZES = {"num_layers": 1, "hidden_size": H, "num_attention_heads": 4, "num_query_groups": GROUPS, "normalization": "RMSNorm"}


def count_collectives(moved: Counter) -> None:
    """Count, by name, the elements of the larger side of each collective from now on."""
    import torch.distributed as dist

    def counted(name: str, collective: Callable) -> Callable:
        def call(*tensors: Any, **options: Any) -> Any:
            flat = [t for x in tensors for t in (x if isinstance(x, list) else [x]) if hasattr(t, "numel")]
            flat += [t for t in options.values() if hasattr(t, "numel")]
            if options.get("group") is not None:  # a group is named in the model's own collectives
                moved[name] += max(t.numel() for t in flat)
            return collective(*tensors, **options)

        return call

    for name in ("all_gather_into_tensor", "reduce_scatter_tensor", "all_reduce", "all_gather", "all_to_all"):
        setattr(dist, name, counted(name, getattr(dist, name)))


def worker(report: Path) -> None:
    moved: Counter = Counter()
    count_collectives(moved)
    import torch

    from llama2_lora.training.cpu import cpu_platform

    found = {}
    with cpu_platform():
        from megatron.core import parallel_state
        from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

        torch.distributed.init_process_group("gloo")
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=TP)
        model_parallel_cuda_manual_seed(1)
        for name, lora in loras().items():
            for sequence_parallel in (False, True):
                moved.clear()
                pass_through(sequence_parallel, lora)
                found[f"{name} sp={sequence_parallel:d}"] = dict(moved)
    if torch.distributed.get_rank() == 0:
        report.write_text(json.dumps(found))
    torch.distributed.barrier()


def loras() -> dict[str, Any]:
    """The frozen layers alone, with our adapters, with NeMo's, and with NeMo's as published runs set it (all-to-all).

    NeMo records arguments by the class made first: ours."""
    from nemo.collections.llm.peft import LoRA

    from llama2_lora.llama2 import ADAPTED
    from llama2_lora.training.adapter import SeededLoRA

    ours = SeededLoRA(seed=1, rank=RANK, alpha=32, dropout=0.1)
    options = dict(target_modules=list(ADAPTED), dim=RANK, alpha=32, dropout=0.1, dropout_position="pre")
    return {"frozen": None, "ours": ours, "nemo": LoRA(**options), "published": LoRA(**options, a2a_experimental=True)}


def pass_through(sequence_parallel: bool, lora: Any) -> None:
    """Both targets of a layer, forward and backward."""
    import torch
    from megatron.core.pipeline_parallel.schedules import custom_backward  # what Megatron's training steps call

    modules = frozen_modules(sequence_parallel)
    if lora is not None:
        modules = {name: lora.transform(module, name, "decoder.layers.0.self_attention") for name, module in modules.items()}
    for name, module in modules.items():
        tokens = S // TP if sequence_parallel and name == "linear_qkv" else S
        width = H if name == "linear_qkv" else H // TP
        x_SBH = torch.randn(tokens, 1, width, requires_grad=True)
        out, _ = module(x_SBH)
        custom_backward(out.sum(), None)
        assert x_SBH.grad is not None


def frozen_modules(sequence_parallel: bool) -> dict[str, Any]:
    import torch
    from megatron.core.extensions.transformer_engine import TELayerNormColumnParallelLinear, TERowParallelLinear
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(
        **SIZES, tensor_model_parallel_size=TP, sequence_parallel=sequence_parallel, add_bias_linear=False
    )
    common = SimpleNamespace(config=config, init_method=torch.nn.init.normal_, bias=False, skip_bias_add=False, is_expert=False)
    qkv_width = H + 2 * GROUPS * H // SIZES["num_attention_heads"]
    modules = {
        "linear_qkv": TELayerNormColumnParallelLinear(
            H, qkv_width, gather_output=False, tp_comm_buffer_name="qkv", **vars(common)
        ),
        "linear_proj": TERowParallelLinear(H, H, input_is_parallel=True, tp_comm_buffer_name="proj", **vars(common)),
    }
    for module in modules.values():
        module.requires_grad_(False)
    return modules


@pytest.fixture(scope="module")
def moved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, int]]:
    report = tmp_path_factory.mktemp("traffic") / "report.json"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={TP}"]
    done = subprocess.run(
        [*torchrun, __file__, report],
        env=clean_environment(PYTHONPATH=f"{ROOT}/src:{ROOT}/tests"),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(report.read_text())


def adapters_share(moved: dict[str, dict[str, int]], whose: str, sp: int) -> int:
    """Elements that all collectives move with the adapters, less what the frozen layers move without."""
    return sum(moved[f"{whose} sp={sp}"].values()) - sum(moved[f"frozen sp={sp}"].values())


def test_ours_moves_the_rank_only(moved: dict[str, dict[str, int]]) -> None:
    # Each of linear_qkv and linear_proj gathers [S, r] in one direction and reduce-scatters it in the other.
    assert adapters_share(moved, "ours", sp=1) == 4 * S * RANK
    # Without sequence parallelism: an all-reduce in linear_qkv's backward and one in linear_proj's forward.
    assert adapters_share(moved, "ours", sp=0) == 2 * S * RANK


def test_nemos_moves_the_width(moved: dict[str, dict[str, int]]) -> None:
    """linear_proj gathers [S, H] in the forward and in the backward, and so does the rank. linear_qkv's gather takes the frozen
    layer's place, where no userbuffer hides it. The all-to-all is of [S / TP, H / TP]."""
    assert adapters_share(moved, "nemo", sp=1) == 2 * S * H + 4 * S * RANK
    assert adapters_share(moved, "published", sp=1) == 2 * S * H / TP**2 + 4 * S * RANK


def test_ours_moves_a_sixteenth_or_less(moved: dict[str, dict[str, int]]) -> None:
    assert adapters_share(moved, "nemo", sp=1) >= 16 * adapters_share(moved, "ours", sp=1)


if __name__ == "__main__":
    worker(Path(sys.argv[1]))
