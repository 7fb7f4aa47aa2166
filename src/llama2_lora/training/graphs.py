"""CUDA graphs: launches that the host has written down once and the GPU repeats, of each layer or of a whole iteration.

    layer       Megatron's graphs of each TransformerLayer's forward and backward, made at the end of the first training step.
                Evaluations run without: Megatron would replay training's graph, dropout included (cuda_graphs.py)
    iteration   one graph of all forward and backward passes of a step with the gradients' reduction, one of an evaluation.
                Each is made at its second call (full_cuda_graph.py); the optimizer is outside

The warm-up makes them all before the clock starts. A graph repeats Python's numbers, so dropout draws from Megatron's
generators, which graphs know, and keeps its masks (dropout.py).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core import full_cuda_graph
from megatron.core.full_cuda_graph import FullCudaGraphWrapper, StaticBufferLoader
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.transformer import cuda_graphs
from megatron.core.transformer.cuda_graphs import CudaGraphManager, delete_cuda_graphs
from megatron.core.transformer.transformer_layer import TransformerLayer
from transformer_engine.pytorch.quantization import FP8GlobalStateManager

ITERATION_SCOPE = "full_iteration"
MANAGER = "cudagraph_manager"  # where a layer keeps its graphs


def configure(config: Any, graphs: str) -> None:
    """Let NeMo and Megatron make graphs. `config` must be connected: before, NeMo 2.7.3 runs Megatron's __post_init__ a second
    time, which takes what it made of enable_cuda_graph itself for a contradiction ("Do not use enable_cuda_graph ...")."""
    config.enable_cuda_graph = config.use_te_rng_tracker = True
    # impl makes layers' graphs. NeMo's wrapper of an iteration (megatron_parallel.py) asks for the scope only.
    implementations = {"layer": ("local", "full"), "iteration": ("none", ITERATION_SCOPE)}
    config.cuda_graph_impl, config.cuda_graph_scope = implementations[graphs]
    cuda_graphs.HAVE_TQDM = False  # a progress bar a rank
    full_cuda_graph.StaticBufferLoader = LoaderAfterReplay


class LoaderAfterReplay(StaticBufferLoader):
    """Megatron's, which copies a micro-batch to where an iteration's graph reads it, on a stream of its own.

    Megatron 0.15.3 lets the graph wait for the copy, not the copy for the graph before: where no step reads a value on the host
    (clipping.py), the next batch overwrites labels that a running graph has not read yet.
    """

    def __call__(self, *arguments: Any) -> Any:
        self.stream.wait_stream(torch.cuda.current_stream())
        return super().__call__(*arguments)


def unset_expandable_segments() -> None:
    """Forget the allocator's option, which config_common.sh sets: Megatron 0.15.3 refuses it beside graphs (cuda_graphs.py).
    Torch reads it at the first allocation."""
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):  # the second name is torch 2.9's
        options = os.environ.pop(name, "").split(",")  # noqa: TID251  put back without one of them
        if kept := [option for option in options if option and not option.startswith("expandable_segments")]:
            os.environ[name] = ",".join(kept)  # noqa: TID251


def keep_rotations(model: torch.nn.Module) -> None:
    """An iteration's graph reads the rotations that the step before it made, of which Megatron remembers the last by length:
    an evaluation in another layout has them forgotten (evaluation.py), and the graph would read memory that was freed."""
    kept: list[torch.Tensor] = []
    for embedding in (m for m in model.modules() if isinstance(m, RotaryEmbedding)):
        embedding.register_forward_hook(lambda module, inputs, rotations: kept.append(rotations))


@contextmanager
def without_layer_graphs(model: torch.nn.Module) -> Iterator[None]:
    """Inside, layers run without their graphs."""
    kept = [(layer, layer._modules.pop(MANAGER)) for layer in _graphed_layers(model)]
    try:
        yield
    finally:
        for layer, manager in kept:
            layer._modules[MANAGER] = manager


@contextmanager
def without_graphs(model: torch.nn.Module) -> Iterator[None]:
    """Inside, nothing is captured and nothing replayed; the graphs stay."""
    config = next(module.config for module in model.modules() if isinstance(module, TransformerLayer))
    scope = config.cuda_graph_scope
    with without_layer_graphs(model):
        config.cuda_graph_scope = "full"  # NeMo asks for the other one before it wraps a step (megatron_parallel.py)
        try:
            yield
        finally:
            config.cuda_graph_scope = scope


def drop_graphs(model: torch.nn.Module) -> None:
    """Forget all graphs and give back their memory."""
    for stage, graph in FullCudaGraphWrapper.cuda_graph.items():
        if graph is not None:
            graph.reset()
        FullCudaGraphWrapper.cuda_graph[stage] = FullCudaGraphWrapper.result[stage] = None
        FullCudaGraphWrapper.curr_iteration[stage] = 0
        StaticBufferLoader.static_buffers[stage] = []
    for layer in list(_graphed_layers(model)):
        del layer._modules[MANAGER]
    delete_cuda_graphs()
    # Where it is not None, what is captured next skips quantizing the weights (Transformer Engine 2.9, module/linear.py).
    FP8GlobalStateManager.skip_fp8_weight_update_tensor = None


def rebuild_graphs(model: torch.nn.Module) -> None:
    """Forget all graphs, and let the next steps make new ones: for a model that computes something else from now on."""
    torch.cuda.synchronize()  # each new manager puts what follows on another stream
    layers = list(_graphed_layers(model))
    drop_graphs(model)
    for layer in layers:
        setattr(layer, MANAGER, CudaGraphManager(layer.config))


def _graphed_layers(model: torch.nn.Module) -> Iterator[TransformerLayer]:
    yield from (m for m in model.modules() if isinstance(m, TransformerLayer) and MANAGER in m._modules)
