"""The checkpoint's weights -> the model, one layer at a time.

NeMo restores all layers in one call. Megatron then makes a bf16 copy of every FP8 weight, whose values nothing reads, before
it loads the bf16 ones (megatron-core 0.15.3, dist_checkpointing/serialization.py, `force_all_tensors_to_non_fp8`): at 70B and
TP4 34 GB a GPU twice over. Here the peak is one layer above the weights, in every precision.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensorFactory
from megatron.core.dist_checkpointing.serialization import get_default_load_sharded_strategy
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelLoadStrategyWrapper
from nemo.lightning import MegatronStrategy


def restore(strategy: MegatronStrategy) -> None:
    """Load `strategy.restore_config.path` into the model that the strategy has set up. Every rank must call it.

    Raises:
        RuntimeError: the checkpoint lacks a weight, or has one of another shape.
    """
    path = strategy.restore_config.path
    metadata = strategy.unwrapped_checkpoint_io.load_content_metadata(path)
    parameters = dict(strategy.megatron_parallel[0].named_parameters())
    for part in layers(strategy.megatron_parallel.sharded_state_dict(metadata=metadata)):
        restore_part(part, parameters, str(Path(path, "weights")))
    if parameters:
        raise RuntimeError(f"CKPT_PATH={path}: has no {', '.join(sorted(parameters)[:3])}")
    torch.cuda.empty_cache()
    strategy.barrier("restore")


def restore_part(part: dict[str, Any], parameters: dict[str, torch.nn.Parameter], folder: str) -> None:
    """Load some weights into their parameters, and take these out of `parameters`. Data-parallel ranks share the reading."""
    for entry in part.values():
        merge_on_device(entry)
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    reader = FullyParallelLoadStrategyWrapper(get_default_load_sharded_strategy(folder), group)
    # Without the check that all ranks together read all layers of a tensor: they read one here
    loaded = dist_checkpointing.load({"state_dict": part}, folder, reader, validate_access_integrity=False)
    with torch.no_grad():
        for name in part:
            parameters.pop(name).copy_(loaded["state_dict"][name])


def layers(sharded: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The weights of a sharded state dict, a layer at a time, then the rest. Takes them out of it, so that they can go.

    _extra_state is left out: it is FP8's history of whatever run made the checkpoint, in a pickle.
    """
    names = defaultdict(list)
    for name, entry in sharded.items():
        if not isinstance(entry, ShardedObject):
            layer = re.search(r"\.layers\.(\d+)\.", name)
            names[layer[1] if layer else "rest"].append(name)
    for group in names.values():
        yield {name: sharded.pop(name) for name in group}


def merge_on_device(entry: Any) -> None:
    """Let the two halves of SwiGLU's weight be joined on the GPU.

    A parallel load leaves what this rank has read on the host and what others sent on the GPU; Megatron (transformer/mlp.py,
    0.15.3) then joins them on the host and collects garbage, once per layer.
    """
    if isinstance(entry, ShardedTensorFactory):
        merge = entry.merge_fn
        entry.merge_fn = lambda halves: merge([half.cuda() for half in halves])
