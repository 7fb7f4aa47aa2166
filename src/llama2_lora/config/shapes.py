"""What of the settings a model of a given shape does not bear. Asked by preflight and train.py alike, before init_start."""

from __future__ import annotations

from collections.abc import Iterator

from llama2_lora.config.settings import Settings
from llama2_lora.llama2 import LlamaShape

# (tokens, width) of a quantized matrix must divide by these. Transformer Engine 2.9: pytorch/utils.py,
# assert_dim_for_fp8_exec; tensor/mxfp8_tensor.py and tensor/nvfp4_tensor.py, whose blocks run along both.
BLOCK = 128  # tensor/float8_blockwise_tensor.py, is_quantizable
FP8_MULTIPLES, FP4_MULTIPLES, MXFP8_MULTIPLES = (8, 16), (16, 16), (32, 32)


def shape_conflicts(settings: Settings, shape: LlamaShape) -> Iterator[str]:
    """What of the settings this model does not bear."""
    p, offload = settings.parallel, settings.performance.offload_layers
    divided = {
        "query heads": shape.heads,
        "key/value groups": shape.kv_groups,
        "FFN columns": shape.ffn,
        "vocabulary entries": shape.vocab,
    }
    for name, number in divided.items():
        if number % p.tp:
            yield f"TP={p.tp}: must divide the model's {number} {name}"
    if settings.optimization.lora_rank % p.tp:
        yield f"TP={p.tp}: must divide LORA_RANK={settings.optimization.lora_rank}: the adapter is sharded, too"
    heads = {"query heads": shape.heads, "key/value groups": shape.kv_groups}
    for name, number in heads.items() if p.cp_exchange == "a2a" else ():
        if number // p.tp % p.cp:
            yield f"CP_COMM=a2a: CP={p.cp} must divide the {number // p.tp} {name} of each of TP={p.tp} ranks; set CP_COMM=p2p"
    if shape.layers % p.pp:
        yield f"PP={p.pp}: must divide the model's {shape.layers} layers"
    if offload >= shape.layers:
        yield f"CPU_OFFLOAD_LAYERS={offload}: must be below the model's {shape.layers} layers; Megatron keeps one on the GPU"
    yield from _low_precision_conflicts(settings, shape)


def _low_precision_conflicts(settings: Settings, shape: LlamaShape) -> Iterator[str]:
    p, layout, batch = settings.precision, settings.parallel, settings.batch
    if not (p.fp8 or p.fp4):
        return
    variable = "FP4=1" if p.fp4 else "FP8=1"
    rows, columns = FP4_MULTIPLES if p.fp4 else MXFP8_MULTIPLES if p.fp8_recipe == "mxfp8" else FP8_MULTIPLES
    sizes = {
        "hidden size": shape.hidden,
        "rows of linear_qkv": shape.qkv_rows,
        "columns of linear_proj": shape.heads * shape.head_dim,
        "FFN columns": shape.ffn,
    }
    for name, size in sizes.items():
        local = size if name == "hidden size" else size // layout.tp
        if local % columns:
            yield f"{variable}: needs multiples of {columns}; the {name} are {local} on each of TP={layout.tp} ranks"
    if p.fp8_recipe == "blockwise" and layout.sequence_parallel:  # blocks are gathered, and gathered whole
        rows = BLOCK
        if shape.hidden % BLOCK:
            yield f"FP8_RECIPE=blockwise: needs a hidden size in multiples of {BLOCK} with SP=1, not {shape.hidden}"
    shards = layout.cp * (layout.tp if layout.sequence_parallel else 1)
    for micro_variable, micro in (("MBS", batch.micro), ("VAL_MBS", batch.validation_micro)):
        tokens = batch.sequence_length * micro // shards
        if tokens % rows:
            found = f"a micro-batch of {micro_variable}={micro} has {tokens} on a rank"
            yield f"{variable}: needs multiples of {rows} tokens; {found}"
