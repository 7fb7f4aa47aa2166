"""Bytes that one GPU needs for a config, item by item, before anything is allocated.

Weights, adapter, gradients and optimizer state are exact. Activations count what autograd keeps from a layer's forward to
its backward; the working set and the libraries are estimates. Sources, by the letter in `Item.source`:

[K] Korthikanti et al., Reducing Activation Recomputation in Large Transformer Models (2205.05198), with what a frozen
    base changes: no weight gradient is computed, so the inputs of the four linear layers are not kept.
[T] Transformer Engine 2.9: module/linear.py, tensor/storage/float8_tensor_storage.py (`update_usage` makes the transpose of
    an FP8 weight in the first forward and keeps it, where GEMMs take one layout only: Hopper).
    module/base.py, comm_gemm_overlap.cpp, triton/cross_entropy.py.
[M] Megatron Core 0.15: distrib_optimizer.py, fused_bias_swiglu.py, cross_entropy.py, transformer_block.py.
[A] training/low_rank.py: the adapter reads what its frozen layer keeps anyway, and keeps [s, r]; dropout masks are drawn again.
[E] An estimate.

s tokens of a sequence on this rank (S / CP), t = TP, h hidden, f FFN width, L layers on this stage, b = MBS.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from llama2_lora.config import schedule
from llama2_lora.config.settings import Settings
from llama2_lora.gpus import Accelerator
from llama2_lora.llama2 import LlamaShape

GB = 1e9
BF16, FP32, FP8, FP4 = 2.0, 4.0, 1.0, 0.5
BLOCK_SCALES = 1 / 32  # MXFP8: a byte per 32 values
FP4_SCALES = 1 / 16  # NVFP4: a byte per 16 values

CONTEXT_GB = 0.7  # [E] CUDA context, cuBLAS and cuDNN handles and workspaces
NCCL_GB_PER_GROUP = 0.4  # [E] channel buffers of one communicator
TIGHT = 0.95  # an account is not better than that
ALLOCATOR_SLACK = 0.02  # [E] of what torch allocates, with expandable segments


@dataclass(frozen=True)
class Item:
    name: str
    bytes: float
    source: str


@dataclass(frozen=True)
class Software:
    """What decides memory but is no setting. The defaults are this project's; PUBLISHED is what submissions ran."""

    keeps_transposes: bool = True
    fp8_swiglu_input: bool = False  # whatever FP8_ACT says
    keeps_bf16_beside_fp4: bool = True
    fp8_attention_beside_fp4: bool = False


PUBLISHED = Software(
    keeps_transposes=False,
    fp8_swiglu_input=True,
    keeps_bf16_beside_fp4=False,
    fp8_attention_beside_fp4=True,
)


@dataclass(frozen=True)
class Memory:
    """Items of the fullest GPU against its capacity. `least` is the total with what published submissions ran."""

    items: tuple[Item, ...]
    least: float
    capacity: int

    @property
    def total(self) -> float:
        return sum(item.bytes for item in self.items)

    @property
    def verdict(self) -> str:
        """fits; tight: above 95%; over: does not fit, but published software would; no: that neither."""
        if self.least > self.capacity:
            return "no"
        if self.total > self.capacity:
            return "over"
        return "tight" if self.total > TIGHT * self.capacity else "fits"

    def as_dict(self) -> dict[str, Any]:
        """For JSON, in GB."""
        return {
            "items": [{"name": item.name, "gb": item.bytes / GB, "source": item.source} for item in self.items],
            "total_gb": self.total / GB,
            "least_gb": self.least / GB,
            "capacity_gb": self.capacity / GB,
            "verdict": self.verdict,
        }


def memory_per_gpu(settings: Settings, shape: LlamaShape, accelerator: Accelerator) -> Memory:
    """The account of the first pipeline stage, which holds most; the logits of the last one are added to be safe."""
    least = sum(item.bytes for item in items(settings, shape, accelerator, PUBLISHED))
    return Memory(items(settings, shape, accelerator, Software()), least, accelerator.memory_bytes)


def items(settings: Settings, shape: LlamaShape, accelerator: Accelerator, software: Software) -> tuple[Item, ...]:
    micro = settings.batch.micro
    tokens = settings.batch.sequence_length / settings.parallel.cp * micro
    logits = _logits(settings, shape, tokens)
    step = [*_activations(settings, shape, software), logits, _working_set(settings, shape, tokens)]
    step_bytes = sum(item.bytes for item in step)
    # A CUDA graph keeps its memory while an evaluation runs.
    free_then = {"none": step_bytes, "layer": logits.bytes, "iteration": 0.0}[settings.performance.graphs]
    found = [
        *_weights(settings, shape, accelerator, software),
        *_adapter(settings, shape),
        *step,
        _evaluation(settings, shape, free_then),
        _healed_warm_up(settings, shape, software),
        _restore(settings, shape, step_bytes),
    ]
    # Beside CUDA graphs segments do not grow, and there are pools: training's, an evaluation's, all that is outside.
    slack = ALLOCATOR_SLACK * (1 if settings.performance.graphs == "none" else 2) * sum(item.bytes for item in found)
    found += [Item("allocator slack", slack, "E"), *_libraries(settings, shape)]
    return tuple(item for item in found if item.bytes)


def linear_parameters(shape: LlamaShape) -> int:
    """Weights of the linear layers in all layers: all that FP8 or FP4 stores."""
    return shape.layers * shape.hidden * (shape.qkv_rows + shape.hidden + 3 * shape.ffn)


def _weights(settings: Settings, shape: LlamaShape, accelerator: Accelerator, software: Software) -> list[Item]:
    p, layout = settings.precision, settings.parallel
    linear = linear_parameters(shape) / (layout.tp * layout.pp)
    quantized = linear * (1 - _bf16_layers(settings) * layout.pp / shape.layers)
    outside = shape.vocab * shape.hidden * (1 if layout.pp > 1 or shape.tied else 2) / layout.tp
    norms = shape.hidden * (2 * shape.layers / layout.pp + 1)
    found = [Item("embedding, output layer, norms (bf16)", BF16 * (outside + norms), "M")]
    all_quantized = p.fp8_weights or p.fp4_weights or (p.fp4 and not software.keeps_bf16_beside_fp4)
    found.append(Item("linear weights (bf16)", BF16 * (linear - quantized if all_quantized else linear), "M"))
    if p.fp4:
        what = "linear weights (FP4)" if p.fp4_weights else "FP4 copies"
        found.append(Item(f"{what}, both directions", 2 * (FP4 + FP4_SCALES) * quantized, "T"))
        if p.fp4_heal_step and p.fp8_recipe == "mxfp8":  # of the other recipes' there is less than of the FP4 ones, which go
            more = 2 * (FP8 + BLOCK_SCALES) - 2 * (FP4 + FP4_SCALES)
            found.append(Item("FP8 weights after the switch, beyond FP4's", more * quantized, "T"))
    if p.fp8:
        blocks = BLOCK_SCALES if p.fp8_recipe == "mxfp8" else 0.0
        what = "linear weights (FP8)" if p.fp8_weights else "FP8 copies of the weights"
        found.append(Item(what, (FP8 + blocks) * quantized, "T"))
        if p.fp8_recipe == "mxfp8":  # its scales run along one axis, so each direction has its own copy
            found.append(Item("FP8 copies for the backward", (FP8 + blocks) * quantized, "T"))
        elif accelerator.needs_fp8_transposes and (software.keeps_transposes or not p.fp8_weights):
            found.append(Item("FP8 transposes for the backward", FP8 * quantized, "T"))
    return found


def _bf16_layers(settings: Settings) -> int:
    """Layers of the first stage that BF16_FIRST_LAYERS and BF16_LAST_LAYERS keep out of FP8 and FP4."""
    p = settings.precision
    return p.first_bf16_layers + (p.last_bf16_layers if settings.parallel.pp == 1 else 0)


def _adapter(settings: Settings, shape: LlamaShape) -> list[Item]:
    """Tensor parallelism shards B of linear_qkv and A of linear_proj; the other two are whole on every rank."""
    layout = settings.parallel
    rank_layers = settings.optimization.lora_rank * shape.layers / layout.pp
    parameters = rank_layers * (2 * shape.hidden + (shape.qkv_rows + shape.hidden) / layout.tp)
    shards = settings.data_parallel_size * layout.cp  # the distributed optimizer shards over both
    return [
        Item("adapter (bf16)", BF16 * parameters, "A"),
        Item("adapter gradients (bf16)", BF16 * parameters, "A"),
        Item("AdamW: fp32 copy and two moments, sharded", 3 * FP32 * parameters / shards, "M"),
    ]


def layer_activations(settings: Settings, shape: LlamaShape, software: Software) -> list[Item]:
    """What one layer keeps of one micro-batch for its backward, without recomputation."""
    layout, p = settings.parallel, settings.precision
    t = layout.tp
    tokens = settings.batch.sequence_length / layout.cp * settings.batch.micro
    sharded = t if layout.sequence_parallel else 1  # of what lies between the tensor-parallel regions
    residual = tokens * shape.hidden / sharded
    attention = FP8 if p.fp8_attention or (p.fp4 and software.fp8_attention_beside_fp4) else BF16
    qkv, out = tokens * shape.qkv_rows / t, tokens * shape.hidden / t
    # linear_qkv's [s, r] before and after the gather, linear_proj's after the scatter; an fp32 number a token for the norm.
    low_rank = BF16 * settings.optimization.lora_rank * tokens * (1 + 2 / sharded) + FP32 * tokens / sharded
    # linear_proj's input is the attention's output, which bf16 attention keeps too, FP8 attention in FP8 only.
    own_input = BF16 * out if attention == FP8 or settings.performance.recompute == "selective" else 0.0
    # CUDA graphs keep the dropout masks, a byte an element (training/dropout.py).
    masks = 0.0 if settings.performance.graphs == "none" else residual + out
    swiglu = FP8 if software.fp8_swiglu_input or settings.precision.fp8_swiglu else BF16
    return [
        Item("inputs of both norms", 2 * BF16 * residual, "K"),
        Item("query, key, value", attention * qkv, "K"),
        Item("attention output", attention * out + FP32 * tokens * shape.heads / t, "K"),
        Item("adapter", low_rank + own_input + masks, "A"),
        Item("SwiGLU input", swiglu * 2 * tokens * shape.ffn / t, "M"),
    ]


def _activations(settings: Settings, shape: LlamaShape, software: Software) -> list[Item]:
    layout, performance = settings.parallel, settings.performance
    layers = shape.layers / layout.pp
    in_flight = min(layout.pp, settings.batch.gradient_accumulation_steps)  # 1F1B, first stage
    one_layer = layer_activations(settings, shape, software)
    if performance.recompute == "full":
        tokens = settings.batch.sequence_length / layout.cp * settings.batch.micro
        layer_inputs = BF16 * tokens * shape.hidden / (layout.tp if layout.sequence_parallel else 1)
        again = sum(item.bytes for item in one_layer)
        return [
            Item("layer inputs (full recomputation)", layers * in_flight * layer_inputs, "K"),
            Item("one layer, recomputed", again, "K"),
        ]
    if performance.recompute == "selective":  # the core attention only: its output goes, q, k and v stay
        one_layer = [item for item in one_layer if item.name != "attention output"]
    # Two offloaded layers' worth is on its way to or from the host.
    offloaded = min(performance.offload_layers, layers)
    kept = layers - max(0.0, offloaded - 2) if offloaded else layers
    return [
        Item(
            f"activations: {item.name}",
            item.bytes * in_flight * kept,
            item.source,
        )
        for item in one_layer
    ]


def _logits(settings: Settings, shape: LlamaShape, tokens: float) -> Item:
    """Megatron: bf16 logits, their fp32 copy, the softmax kept for the backward, and the bf16 gradient. Transformer Engine's
    kernel: the bf16 logits, which their gradient overwrites in the forward."""
    each, source = (BF16, "T") if settings.kernels.cross_entropy == "te" else (2 * BF16 + 2 * FP32, "M")
    return Item("logits and cross entropy", each * tokens * shape.vocab / settings.parallel.tp, source)


def _working_set(settings: Settings, shape: LlamaShape, tokens: float) -> Item:
    """Of the largest layer backward, the MLP: gradients of fc1's output twice, and four tensors of the width h."""
    size = 2 * BF16 * tokens * 2 * shape.ffn / settings.parallel.tp + 4 * BF16 * tokens * shape.hidden
    return Item("working set of one layer", size, "E")


def _evaluation(settings: Settings, shape: LlamaShape, free_bytes: float) -> Item:
    """What an evaluation needs above what training leaves it. It keeps no activations: one layer's and the logits, which are
    counted as in training, though there is no gradient."""
    micro = settings.batch.validation_micro
    tokens = settings.batch.sequence_length / settings.parallel.evaluation_cp * micro
    needed = _logits(settings, shape, tokens).bytes + _working_set(settings, shape, tokens).bytes
    return Item(f"evaluation with VAL_MBS={micro}, beyond a step", max(0.0, needed - free_bytes), "E")


def _healed_warm_up(settings: Settings, shape: LlamaShape, software: Software) -> Item:
    """The warm-up of what follows FP4_HEAL_STEP, beside graphs that keep a step's memory."""
    beside = settings.performance.graphs != "none" and settings.precision.fp4_heal_step is not None
    layers = schedule.HEALED_LAYERS if beside else 0
    weights = FP8 * linear_parameters(shape) / shape.layers / settings.parallel.tp
    activations = sum(item.bytes for item in layer_activations(settings, shape, software))
    return Item("warm-up of the healed layers, beside graphs", layers * (weights + activations), "E")


def restore_bytes(settings: Settings, shape: LlamaShape) -> float:
    """What restoring needs above the weights: one layer in bf16, as it is loaded, and where the weights are FP8 or FP4 once
    more, as Megatron's copy of them (training/restore.py)."""
    copies = 2 if settings.precision.fp8_weights or settings.precision.fp4_weights else 1
    return copies * BF16 * linear_parameters(shape) / shape.layers / settings.parallel.tp


def _restore(settings: Settings, shape: LlamaShape, step_bytes: float) -> Item:
    """The same, beyond a training step, which comes when it is over."""
    return Item("restoring the weights, beyond a step", max(0.0, restore_bytes(settings, shape) - step_bytes), "M")


def _libraries(settings: Settings, shape: LlamaShape) -> list[Item]:
    layout = settings.parallel
    dp = settings.data_parallel_size
    groups = 1 + sum(size > 1 for size in (layout.tp, layout.pp, layout.cp, dp, dp * layout.cp))
    tokens = settings.batch.sequence_length / layout.cp * settings.batch.micro
    buffers = _userbuffers(settings) * tokens * shape.hidden if settings.performance.tp_comm_overlap else 0.0
    return [
        Item("userbuffers", buffers, "T"),
        Item(f"NCCL, {groups} communicators", groups * NCCL_GB_PER_GROUP * 1e9, "E"),
        Item("CUDA context and libraries", CONTEXT_GB * 1e9, "E"),
    ]


def _userbuffers(settings: Settings) -> float:
    """Bytes per token and feature of the buffers of training/overlap.py, which all layers share."""
    gathered = FP8 if settings.precision.fp8 else BF16
    t = settings.parallel.tp
    ring = BF16 * (2 * t - 1) / t  # a ring that sums has 2 t - 1 pieces for t
    used = 4 * gathered + 2 * BF16 + 2 * ring  # four gathers, two pipelined reduce-scatters, two in a ring
    return used + 2 * BF16 + 2 * gathered  # and four of weight gradients, which nobody uses


def what_would_fit(settings: Settings, shape: LlamaShape, accelerator: Accelerator) -> str | None:
    """The cheapest settings, in time, with which the config would fit; None where none of them does."""
    for variables, changed in _savings(settings, shape):
        if memory_per_gpu(changed, shape, accelerator).verdict in ("fits", "tight"):
            return variables
    return None


def _savings(settings: Settings, shape: LlamaShape) -> Iterator[tuple[str, Settings]]:
    def changed(**performance: Any) -> Settings:
        return replace(settings, performance=replace(settings.performance, **performance))

    if settings.batch.validation_micro > 1:
        yield "VAL_MBS=1", replace(settings, batch=replace(settings.batch, validation_micro=1))
    if (settings.precision.fp8 or settings.precision.fp4) and not settings.precision.fp8_swiglu:
        yield "FP8_ACT=1", replace(settings, precision=replace(settings.precision, fp8_swiglu=True))
    if settings.parallel.pp == 1:
        for layers in range(1, shape.layers // 2 + 1):  # the host link is too slow for more
            yield f"CPU_OFFLOAD_LAYERS={layers}", changed(offload_layers=layers, recompute="none")
    yield "RECOMPUTE=full", changed(recompute="full", offload_layers=0)
