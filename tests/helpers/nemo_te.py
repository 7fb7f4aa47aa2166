"""Load a checkpoint into Transformer Engine's layers, whose modules have an _extra_state each, without a GPU.

python tests/helpers/nemo_te.py CHECKPOINT OUT.npz      writes every parameter by its name in the module
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np


def main(checkpoint: Path, out: Path) -> None:
    import torch

    from helpers.fake_cuda import fake_gpus
    from llama2_lora.weights.checkpoint import read_shape

    shape = read_shape(checkpoint)
    with fake_gpus():
        from megatron.core import dist_checkpointing, parallel_state
        from nemo.collections import llm

        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        parallel_state.initialize_model_parallel()
        config = llm.LlamaConfig(
            num_layers=shape.layers,
            hidden_size=shape.hidden,
            ffn_hidden_size=shape.ffn,
            num_attention_heads=shape.heads,
            num_query_groups=shape.kv_groups,
            seq_length=shape.max_positions,
            vocab_size=shape.vocab,
            share_embeddings_and_output_weights=shape.tied,
            use_cpu_initialization=True,
            gradient_accumulation_fusion=False,
        )
        llama = llm.LlamaModel(config)
        llama.configure_model()
        for parameter in llama.module.parameters():
            parameter.data.fill_(float("nan"))  # what is not loaded shows
        sharded = {"state_dict": llama.module.sharded_state_dict(prefix="module.")}
        loaded = dist_checkpointing.load(sharded, str(checkpoint / "weights"))["state_dict"]
        llama.module.load_state_dict({name.removeprefix("module."): x for name, x in loaded.items()}, strict=True)
    np.savez(out, **{name: p.detach().numpy() for name, p in llama.module.named_parameters()})


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
