"""The CPU platform and its layers: two and four ranks over gloo must train as one rank does.

Run by pytest it launches itself with torchrun; a launched copy builds a tiny Llama with LoRA once per layout from the one-rank
checkpoint, trains it with Megatron's own schedules, DDP and distributed optimizer, and writes what it saw to a JSON file.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

LAYERS, HIDDEN, FFN, HEADS, GROUPS, SEQUENCE, VOCAB = 2, 32, 48, 4, 2, 32, 64
BATCH, STEPS, TOLERANCE = 4, 5, 1e-5

ONE_RANK = {"one": {}}
TWO_RANKS = {
    "dp2": {},
    "tp2": {"tp": 2},
    "pp2": {"pp": 2},
    "cp2": {"cp": 2},
    "tp2_sp": {"tp": 2, "sp": True},
}
FOUR_RANKS = {
    "tp2_sp_cp2": {"tp": 2, "sp": True, "cp": 2},
    "tp2_sp_pp2": {"tp": 2, "sp": True, "pp": 2},
    "pp2_cp2": {"pp": 2, "cp": 2},
    "dp2_cp2": {"cp": 2},
    "cp4": {"cp": 4},
}
# The Transformer Engine layers' names (the project's checkpoint layout), without their _extra_state.
BASE_KEYS = {
    "module.decoder.final_layernorm.weight",
    "module.decoder.layers.mlp.linear_fc1.layer_norm_weight",
    "module.decoder.layers.mlp.linear_fc1.weight",
    "module.decoder.layers.mlp.linear_fc2.weight",
    "module.decoder.layers.self_attention.linear_proj.weight",
    "module.decoder.layers.self_attention.linear_qkv.layer_norm_weight",
    "module.decoder.layers.self_attention.linear_qkv.weight",
    "module.embedding.word_embeddings.weight",
    "module.output_layer.weight",
}


# What a launched process does -------------------------------------------------------------------------------------


def worker(folder: Path, layouts: dict[str, dict]) -> None:
    from llama2_lora.training.cpu import cpu_platform

    with cpu_platform():
        torch.distributed.init_process_group("gloo")
        rank = torch.distributed.get_rank()
        seen = {name: train(folder, **layout) for name, layout in layouts.items()}
        everyone: list = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(everyone, seen)
        torch.distributed.destroy_process_group()
    if rank == 0:
        (folder / f"{'-'.join(layouts)}.json").write_text(json.dumps(everyone))


def train(folder: Path, tp: int = 1, pp: int = 1, cp: int = 1, sp: bool = False) -> dict:
    """Train from the checkpoint in `folder`, which one rank makes; return losses, gradient norms and logit errors."""
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(tp, pp, context_parallel_size=cp)
    model_parallel_cuda_manual_seed(1, force_reset_rng=True)
    model, optimizer = build(folder, tp, pp, cp, sp)
    keys = sorted({entry.key for entry in model.module.sharded_state_dict(prefix="module.").values()})
    errors = [logit_error(model, folder / "logits_before.pt")]
    losses, norms = [], []
    for step in range(STEPS):
        model.zero_grad_buffer()
        optimizer.zero_grad()
        dp, dp_rank = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
        rows = rows_of(step)[dp_rank::dp]
        outputs = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter(rows),
            model=[model],
            num_microbatches=len(rows),
            seq_length=SEQUENCE,
            micro_batch_size=1,
            forward_only=False,
        )
        norms.append(optimizer.step()[1])
        if outputs:
            total = torch.stack(outputs).sum()
            torch.distributed.all_reduce(total, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
            losses.append(total.item() / BATCH)
    errors.append(logit_error(model, folder / "logits_after.pt"))
    return {"losses": losses, "norms": norms, "logit_errors": errors, "keys": keys}


def build(folder: Path, tp: int, pp: int, cp: int, sp: bool):
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from nemo.collections import llm

    from llama2_lora.training.cpu import CPU_MODEL_OPTIONS, cpu_layer_spec

    config = llm.LlamaConfig(
        num_layers=LAYERS,
        hidden_size=HIDDEN,
        ffn_hidden_size=FFN,
        num_attention_heads=HEADS,
        num_query_groups=GROUPS,
        seq_length=SEQUENCE,
        vocab_size=VOCAB,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        context_parallel_size=cp,
        sequence_parallel=sp,
        pipeline_dtype=torch.float32,
        transformer_layer_spec=cpu_layer_spec,
        **CPU_MODEL_OPTIONS,
    )
    llama = llm.LlamaModel(config)
    llama.configure_model()
    share_weights(llama.module, folder / "base")
    lora = llm.peft.LoRA(target_modules=["linear_qkv", "linear_proj"], dim=4, alpha=8, lora_A_init_method="kaiming")
    llama.freeze()  # this and the walk are what lora(llama) does, but it asks for a Lightning trainer
    llama.walk(lora.transform)
    for name, parameter in llama.named_parameters():
        if "linear_out" in name:  # B: not zero, so that an error in A shows in the first step
            torch.nn.init.normal_(parameter, std=0.1)
    share_weights(llama.module, folder / "adapter")
    ddp = DistributedDataParallelConfig(use_distributed_optimizer=True)
    model = DistributedDataParallel(config, ddp, llama.module)
    config.finalize_model_grads_func = finalize_model_grads
    optimizer = OptimizerConfig(optimizer="adam", lr=1e-2, clip_grad=0.05, use_distributed_optimizer=True)
    return model, get_megatron_optimizer(optimizer, [model])


def share_weights(module, folder: Path) -> None:
    """One rank writes the weights (once an adapter is there, its weights only); any layout loads them."""
    from megatron.core import dist_checkpointing

    def sharded():
        entries = module.sharded_state_dict(prefix="")
        return {name: entry for name, entry in entries.items() if folder.name == "base" or ".adapter." in name}

    if torch.distributed.get_world_size() == 1:
        folder.mkdir()
        dist_checkpointing.save(sharded(), str(folder))
    missing, unexpected = module.load_state_dict(dist_checkpointing.load(sharded(), str(folder)), strict=False)
    assert not unexpected
    assert folder.name == "adapter" or not [name for name in missing if not name.endswith("_extra_state")]


def rows_of(step: int) -> list[dict[str, torch.Tensor]]:
    """The rows of a global batch; each row's loss weights sum to 1, over unlike numbers of tokens."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, VOCAB, (BATCH, SEQUENCE + 1), generator=generator)
    mask = torch.rand(BATCH, SEQUENCE, generator=generator) < torch.linspace(0.2, 0.9, BATCH)[:, None]
    weights = mask / mask.sum(dim=1, keepdim=True)
    return [{"tokens": t[None, :-1], "labels": t[None, 1:], "weights": w[None]} for t, w in zip(tokens, weights, strict=True)]


def forward_step(rows, model):
    from megatron.core.utils import get_batch_on_this_cp_rank

    row = get_batch_on_this_cp_rank(dict(next(rows)))

    def weighted_sum(losses):
        total = (losses * row["weights"]).sum()
        return total, total.detach().clone()  # Megatron scales the first in place

    return model(input_ids=row["tokens"], position_ids=None, attention_mask=None, labels=row["labels"]), weighted_sum


@torch.no_grad()
def logit_error(model, reference: Path) -> float | None:
    """Largest deviation of this rank's logits from the one-rank model's, on the last stage; one rank writes them."""
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.utils import get_batch_on_this_cp_rank

    def forward_logits(rows, model):
        row = get_batch_on_this_cp_rank(dict(next(rows)))
        return model(row["tokens"], None, None), lambda logits, non_loss_data: logits

    outputs = get_forward_backward_func()(
        forward_step_func=forward_logits,
        data_iterator=iter(rows_of(99)[:1]),
        model=[model],
        num_microbatches=1,
        seq_length=SEQUENCE,
        micro_batch_size=1,
        forward_only=True,
        collect_non_loss_data=True,
    )
    if not parallel_state.is_pipeline_last_stage():
        return None
    logits = outputs[0]
    if torch.distributed.get_world_size() == 1:
        torch.save(logits, reference)
    expected = get_batch_on_this_cp_rank({"logits": torch.load(reference)})["logits"]
    tp, tp_rank = parallel_state.get_tensor_model_parallel_world_size(), parallel_state.get_tensor_model_parallel_rank()
    return (logits - expected.chunk(tp, dim=-1)[tp_rank]).abs().max().item()


# The tests -------------------------------------------------------------------------------------------------------


def launch(folder: Path, ranks: int, layouts: dict[str, dict]) -> list[dict]:
    """Run `worker` on `ranks` processes; return what each rank saw per layout."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    done = subprocess.run(
        [*torchrun, __file__, str(folder), json.dumps(layouts)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=540,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((folder / f"{'-'.join(layouts)}.json").read_text())


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cpu")
    return folder, launch(folder, 1, ONE_RANK)[0]["one"]


@pytest.fixture(scope="module")
def two_ranks(one_rank):
    return launch(one_rank[0], 2, TWO_RANKS)


@pytest.fixture(scope="module")
def four_ranks(one_rank):
    return launch(one_rank[0], 4, FOUR_RANKS)


def assert_same_training(ranks: list[dict], layout: str, expected: dict) -> None:
    for seen in (rank[layout] for rank in ranks):
        assert seen["norms"] == pytest.approx(expected["norms"], abs=TOLERANCE)
        assert seen["losses"] in ([], pytest.approx(expected["losses"], abs=TOLERANCE))
        assert all(error is None or error < TOLERANCE for error in seen["logit_errors"]), seen["logit_errors"]
    assert any(rank[layout]["losses"] for rank in ranks)


@pytest.mark.parametrize("layout", TWO_RANKS)
def test_two_ranks_train_as_one(layout, two_ranks, one_rank):
    assert_same_training(two_ranks, layout, one_rank[1])


@pytest.mark.parametrize("layout", FOUR_RANKS)
def test_four_ranks_train_as_one(layout, four_ranks, one_rank):
    assert_same_training(four_ranks, layout, one_rank[1])


def test_one_rank_learns_and_is_clipped(one_rank):
    """Without this the comparisons above could compare runs that do nothing."""
    losses, norms = one_rank[1]["losses"], one_rank[1]["norms"]
    assert len(set(losses)) == STEPS
    assert min(norms) > 0.05  # above clip_grad


def test_sharded_keys_are_those_of_the_transformer_engine_layers(one_rank):
    weights = {key for key in one_rank[1]["keys"] if not key.endswith("_extra_state")}
    assert {key for key in weights if ".adapter." not in key} == BASE_KEYS
    assert len(weights - BASE_KEYS) == 4  # A and B of linear_qkv and linear_proj


if __name__ == "__main__":
    worker(Path(sys.argv[1]), json.loads(sys.argv[2]))
