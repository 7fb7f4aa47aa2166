"""Load checkpoints (and adapters) with NeMo on the CPU, under several layouts, and write logits and adapters to files.

    torchrun --nproc-per-node=2 tests/helpers/nemo_model.py JOBS.json

Importing NeMo takes longer than a job, so a test file launches once, for all of its jobs. A job:

    checkpoint, tokens   what to load, and the .npy to feed it, [rows, sequence]
    logits               .npy to write
    tp, pp               layout of the two ranks; data parallel where both are 1
    adapter, gathered    adapter to load, and where to write what the ranks gather of it
    context              .json to write: what NeMo builds from the checkpoint's context
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from helpers import ROOT


def launch(jobs: list[dict], folder: Path) -> None:
    """Run the jobs in two processes (TP=1 and PP=1: data parallel); raises with the end of their output."""
    file = folder / "jobs.json"
    file.write_text(json.dumps(jobs, default=str))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": f"{ROOT}/src:{ROOT}/tests"}
    done = subprocess.run([*torchrun, __file__, file], env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-6000:]


def main(jobs: list[dict]) -> None:
    from llama2_lora.training.cpu import cpu_platform

    with cpu_platform():
        for job in jobs:
            run(**job)


def run(
    checkpoint: str,
    tokens: str,
    logits: str,
    tp: int = 1,
    pp: int = 1,
    adapter: str | None = None,
    gathered: str | None = None,
    context: str | None = None,
) -> None:
    import torch

    from llama2_lora.training.adapter import gather_adapter
    from llama2_lora.weights.checkpoint import check_checkpoint, read_adapter, read_shape, write_adapter

    shape = read_shape(Path(checkpoint))
    check_checkpoint(Path(checkpoint), shape)
    arrays, rank, alpha = {}, 0, 0
    if adapter:
        arrays, _, rank, alpha = read_adapter(Path(adapter))
    if context:
        Path(context).write_text(json.dumps(build_context(checkpoint)))
    model = load(checkpoint, shape, tp, pp)
    if arrays:
        add_adapter(model, arrays, rank, alpha)
    if gathered:
        whole = gather_adapter(model)
        if torch.distributed.get_rank() == 0:
            write_adapter(Path(gathered), whole, shape, rank, alpha)
    found = forward(model, torch.from_numpy(np.load(tokens)))
    if found is not None:
        np.save(logits, found.float().numpy())
    torch.distributed.barrier()


def load(checkpoint, shape, tp, pp):
    """The bare model with its weights restored the way that training restores them."""
    import torch
    from megatron.core import parallel_state
    from nemo import lightning as nl
    from nemo.collections import llm
    from nemo.lightning._strategy_lib import init_model_parallel
    from nemo.lightning.pytorch.strategies.utils import RestoreConfig

    parallel_state.destroy_model_parallel()
    config = llm.LlamaConfig(
        num_layers=shape.layers,
        hidden_size=shape.hidden,
        ffn_hidden_size=shape.ffn,
        num_attention_heads=shape.heads,
        num_query_groups=shape.kv_groups,
        layernorm_epsilon=shape.norm_eps,
        rotary_base=shape.rope_base,
        share_embeddings_and_output_weights=shape.tied,
        seq_length=shape.max_positions,
        vocab_size=shape.vocab,
        gradient_accumulation_fusion=False,  # needs APEX
    )
    strategy = nl.MegatronStrategy(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        pipeline_dtype=torch.float32,
        setup_optimizers=False,
        restore_config=RestoreConfig(path=checkpoint, load_artifacts=False),
    )
    trainer = nl.Trainer(devices=2, accelerator="cpu", strategy=strategy, logger=False, enable_checkpointing=False)
    model = llm.LlamaModel(config)
    strategy.connect(model)
    strategy.setup_environment()
    if not parallel_state.model_parallel_is_initialized():  # NeMo does it once per process
        init_model_parallel(model)
    with trainer.init_module():
        model.configure_model()
    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))  # what is not restored shows
    strategy.setup(trainer)
    return model.module


def build_context(checkpoint):
    """Fields of the model's configuration and the tokenizer's size, as NeMo builds them from the context."""
    import fiddle
    from nemo.lightning.io import load_context

    context = load_context(Path(checkpoint), subpath="model", build=False)
    model = fiddle.build(context)
    names = ("num_layers", "hidden_size", "ffn_hidden_size", "num_query_groups", "vocab_size", "params_dtype", "bf16")
    fields = {name: str(getattr(model.config, name)) for name in names}
    return fields | {"tokenizer": model.tokenizer.vocab_size, "ids": model.tokenizer.text_to_ids("w5 w7")}


def add_adapter(module, arrays, rank, alpha):
    import torch

    from llama2_lora.training.adapter import SeededLoRA, _shard, adapter_weights

    lora = SeededLoRA(1, rank, alpha, 0.0)
    for name, child in list(module.named_modules()):
        if child.__class__.__name__ == "SelfAttention":
            for target in lora.target_modules:
                setattr(child, target, lora.transform(getattr(child, target), name=target, prefix=f"{name}"))
    for name, weight in adapter_weights(module):
        weight.data.copy_(_shard(torch.from_numpy(arrays[name]), weight))


def forward(module, tokens):
    """Whole logits, [rows, sequence, vocabulary], on one rank of the last stage; None elsewhere."""
    import torch
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    def step(rows, model):
        return model(next(rows), None, None), lambda logits, non_loss_data: logits

    module.eval()
    with torch.no_grad():
        outputs = get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=iter([tokens]),
            model=[module],
            num_microbatches=1,
            seq_length=tokens.shape[1],
            micro_batch_size=tokens.shape[0],
            forward_only=True,
            collect_non_loss_data=True,
        )
        if not parallel_state.is_pipeline_last_stage():
            return None
        whole = gather_from_tensor_model_parallel_region(outputs[0])
    first = parallel_state.get_tensor_model_parallel_rank() == parallel_state.get_data_parallel_rank() == 0
    return whole if first else None


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
