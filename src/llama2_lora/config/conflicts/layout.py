"""Ranks, batch and schedule."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llama2_lora.config import schedule
from llama2_lora.config.conflicts.rule import Rules
from llama2_lora.config.values import walltime_minutes
from llama2_lora.findings import one_line

if TYPE_CHECKING:
    from llama2_lora.config.settings import Settings

RULES = rule = Rules()


# ---- Ranks -----------------------------------------------------------------------------------------------------------


@rule
def config_file_has_the_name(s: Settings) -> str | None:
    if s.system.config_file in ("", f"config_{s.system.name}.sh"):
        return None
    found, name = one_line(s.system.config_file), one_line(s.system.name)
    return f"CONFIG_FILE={found}: must be config_{name}.sh, after DGXSYSTEM={name}; rename one of them"


@rule
def system_name_says_the_shape(s: Settings) -> str | None:
    shape = f"{s.system.nodes}x{s.system.gpus_per_node}x{s.batch.minibs}"
    if s.system.name.rsplit("_", 1)[-1] == shape:
        return None
    name = one_line(s.system.name)
    return f"DGXSYSTEM={name}: must end in _{shape}, that is DGXNNODES x DGXNGPU x MINIBS; rename it and the config"


@rule
def replicas_are_whole(s: Settings) -> str | None:
    p, system = s.parallel, s.system
    try:
        schedule.data_parallel_size(system.nodes, system.gpus_per_node, p.tp, p.pp, p.cp)
    except ValueError as error:
        return f"{error}; change one of the five"
    return None


@rule
def tensor_parallel_group_is_on_one_node(s: Settings) -> str | None:
    tp, gpus = s.parallel.tp, s.system.gpus_per_node
    if tp > gpus:
        return f"TP={tp}: must not exceed DGXNGPU={gpus}: tensor parallelism needs NVLink; use PP or CP across nodes"
    if gpus % tp:
        return f"TP={tp}: must divide DGXNGPU={gpus}, or a tensor-parallel group straddles two nodes"
    return None


@rule
def sequence_parallel_needs_tensor_parallel(s: Settings) -> str | None:
    if s.parallel.sequence_parallel and s.parallel.tp == 1:
        return "SP=1: needs TP > 1: it shards the sequence over the TP group; set SP=0"
    return None


@rule
def overlap_needs_sequence_parallel(s: Settings) -> str | None:
    if s.performance.tp_comm_overlap and not s.parallel.sequence_parallel:
        return "TP_COMM_OVERLAP=1: needs SP=1 (and TP > 1): userbuffers overlap the sequence-parallel collectives"
    return None


@rule
def evaluation_has_the_layout_or_whole_rows(s: Settings) -> str | None:
    if s.parallel.evaluation_cp in (1, s.parallel.cp):
        return None
    return f"VAL_CP={s.parallel.validation_cp}: must be 1 or CP={s.parallel.cp}; unset it to evaluate as training does"


@rule
def whole_rows_need_one_stage_and_no_overlap(s: Settings) -> str | None:
    if s.parallel.evaluation_cp != 1 or s.parallel.cp == 1:
        return None
    if s.parallel.pp > 1:
        return f"VAL_CP=1: needs PP=1, not {s.parallel.pp}: stages pass on tensors of training's size; unset it"
    if s.performance.tp_comm_overlap:
        return f"VAL_CP=1: contradicts TP_COMM_OVERLAP=1 at CP={s.parallel.cp}: userbuffers have one size; unset one of them"
    return None


@rule
def gathered_keys_exclude_fp8_attention(s: Settings) -> str | None:
    if s.parallel.cp > 1 and s.parallel.cp_exchange == "all_gather" and s.precision.fp8_attention:
        return "CP_COMM=all_gather: contradicts FP8_DPA=1: Transformer Engine 2.9 gathers no FP8 keys; set CP_COMM=a2a or p2p"
    return None


@rule
def all_ranks_are_launched(s: Settings) -> str | None:
    world, system = s.system.world_size, s.system
    if world in (None, system.nodes * system.gpus_per_node):
        return None
    shape = f"{system.nodes}*{system.gpus_per_node}={system.nodes * system.gpus_per_node}"
    return f"WORLD_SIZE={world}: must equal DGXNNODES*DGXNGPU={shape}; launch that many ranks"


@rule
def rank_is_one_of_the_ranks(s: Settings) -> str | None:
    if s.system.world_size is not None and s.system.rank >= s.system.world_size:
        return f"RANK={s.system.rank}: must be below WORLD_SIZE={s.system.world_size}"
    return None


@rule
def local_rank_is_on_the_node(s: Settings) -> str | None:
    if s.system.local_rank >= s.system.gpus_per_node:
        return f"LOCAL_RANK={s.system.local_rank}: must be below DGXNGPU={s.system.gpus_per_node}"
    return None


@rule
def walltime_is_a_time(s: Settings) -> str | None:
    try:
        walltime_minutes(s.system.walltime)
    except ValueError as error:
        return f"WALLTIME={one_line(s.system.walltime)}: {error}"
    return None


# ---- Batch and schedule ----------------------------------------------------------------------------------------------


@rule
def micro_batches_are_whole(s: Settings) -> str | None:
    if s.batch.minibs % s.batch.micro:
        return f"MBS={s.batch.micro}: must divide MINIBS={s.batch.minibs}"
    return None


@rule
def context_parallel_chunks_are_whole(s: Settings) -> str | None:
    cp, tokens = s.parallel.cp, s.batch.sequence_length
    if cp > 1 and tokens % (2 * cp):
        return f"MAX_SEQLEN={tokens}: must be divisible by 2*CP={2 * cp}: each rank takes two chunks"
    return None


@rule
def sequence_shards_are_whole(s: Settings) -> str | None:
    shards, tokens = s.parallel.tp * s.parallel.cp, s.batch.sequence_length
    if s.parallel.sequence_parallel and tokens % shards:
        return f"MAX_SEQLEN={tokens}: must be divisible by TP*CP={shards} with SP=1"
    return None


@rule
def a_run_evaluates(s: Settings) -> str | None:
    p, system, e, steps = s.parallel, s.system, s.evaluation, s.optimization.max_steps
    if system.nodes * system.gpus_per_node % p.model_parallel_size:
        return None  # GBS is not known; replicas_are_whole says so
    first = schedule.first_eval_step(s.global_batch_size, e.every_sequences, e.skip)
    if steps < first:
        return f"MAX_STEPS={steps}: must be at least {first}, the step of the first evaluation; no run can succeed before"
    return None


@rule
def offload_needs_one_stage(s: Settings) -> str | None:
    if s.performance.offload_layers and s.parallel.pp > 1:
        return f"CPU_OFFLOAD_LAYERS={s.performance.offload_layers}: needs PP=1: Megatron offloads without pipelining only"
    return None


@rule
def offload_excludes_recomputation(s: Settings) -> str | None:
    if s.performance.offload_layers and s.performance.recompute != "none":
        return f"CPU_OFFLOAD_LAYERS={s.performance.offload_layers}: needs RECOMPUTE=none: what is recomputed is not offloaded"
    return None


@rule
def overlap_has_one_buffer_size(s: Settings) -> str | None:
    micro, validation = s.batch.micro, s.batch.validation_micro
    if s.performance.tp_comm_overlap and validation != micro:
        return f"VAL_MBS={validation}: must equal MBS={micro} with TP_COMM_OVERLAP=1: userbuffers have one size"
    return None


@rule
def overlap_has_one_kind_of_buffer(s: Settings) -> str | None:
    p = s.precision
    asked = {
        "FP4=1": p.fp4,
        "FP8_RECIPE=blockwise": p.fp8 and p.fp8_recipe == "blockwise",
        "BF16_FIRST_LAYERS and BF16_LAST_LAYERS": p.first_bf16_layers + p.last_bf16_layers > 0,
    }
    if not s.performance.tp_comm_overlap or not any(asked.values()):
        return None
    name = next(name for name, on in asked.items() if on)
    return f"TP_COMM_OVERLAP=1: contradicts {name}: userbuffers hold bf16 or one FP8 tensor a layer; set TP_COMM_OVERLAP=0"
