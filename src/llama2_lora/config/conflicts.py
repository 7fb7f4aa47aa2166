"""What excludes what: one function a rule, which names variable, value, reason and fix, or returns None.

A rule that reads a setting without a legal value is passed over; all others still speak. So a rule is a function of its
own, and reads nothing that it does not need.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from llama2_lora.config import rules, schedule
from llama2_lora.config.values import walltime_minutes, window
from llama2_lora.findings import one_line
from llama2_lora.gpus import accelerator_of

if TYPE_CHECKING:
    from llama2_lora.config.settings import Settings

# Fixed by the rules: free only in a rehearsal, which proves nothing to MLPerf, and in the open division.
FIXED_IN_CLOSED = {
    "MAX_SEQLEN": rules.SEQUENCE_LENGTH,
    "GRADIENT_CLIP_NORM": rules.GRADIENT_CLIP_NORM,
    "WEIGHT_DECAY": rules.WEIGHT_DECAY,
    "LORA_RANK": rules.LORA_RANK,
    "LORA_ALPHA": rules.LORA_ALPHA,
    "LORA_DROPOUT": rules.LORA_DROPOUT,
    "TARGET_LOSS": rules.TARGET_LOSS,
    "EVAL_EVERY_SEQUENCES": rules.EVAL_EVERY_SEQUENCES,
    "EVAL_SKIP": None,
}
Rule = Callable[["Settings"], "str | None"]
RULES: list[Rule] = []


def rule(check: Rule) -> Rule:
    RULES.append(check)
    return check


def contradictions(settings: Settings, complete: bool) -> Iterator[str]:
    """Every rule that the settings break. Not `complete`: fields without a legal value are missing (values.parse_group)."""
    for check in RULES:
        try:
            problem = check(settings)
        except AttributeError:
            if complete:
                raise
            continue
        if problem:
            yield problem


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


# ---- Precision -------------------------------------------------------------------------------------------------------


@rule
def one_precision(s: Settings) -> str | None:
    if s.precision.fp8 and s.precision.fp4:
        return "FP4=1: contradicts FP8=1: a linear layer has one precision; set one of them to 0"
    return None


@rule
def fp8_swiglu_follows_low_precision(s: Settings) -> str | None:
    low = s.precision.fp8 or s.precision.fp4
    return "FP8_ACT=1: needs FP8=1 or FP4=1" if s.precision.fp8_swiglu and not low else None


@rule
def fp4_weights_follow_fp4(s: Settings) -> str | None:
    return "FP4_PARAMS=1: needs FP4=1" if s.precision.fp4_weights and not s.precision.fp4 else None


@rule
def healing_follows_fp4(s: Settings) -> str | None:
    step, steps = s.precision.fp4_heal_step, s.optimization.max_steps
    if step is None:
        return None
    if not s.precision.fp4:
        return f"FP4_HEAL_STEP={step}: needs FP4=1: it is where the run leaves FP4 for FP8; unset it"
    if step >= steps:
        return f"FP4_HEAL_STEP={step}: must be below MAX_STEPS={steps}; unset it to stay in FP4"
    return None


def needs_fp8(variable: str) -> Rule:
    def check(s: Settings) -> str | None:
        return f"{variable}=1: needs FP8=1" if s.value(variable) and not s.precision.fp8 else None

    return check


RULES += [needs_fp8(variable) for variable in ("FP8_DPA", "FP8_PARAMS")]


@rule
def fp8_attention_is_scaled_with_delay(s: Settings) -> str | None:
    p = s.precision
    if p.fp8_attention and p.fp8_recipe != "delayed":
        return f"FP8_DPA=1: needs FP8_RECIPE=delayed, not {p.fp8_recipe}: Transformer Engine 2.9 scales attention so"
    return None


@rule
def part_has_mxfp8(s: Settings) -> str | None:
    if not s.precision.fp8 or s.precision.fp8_recipe != "mxfp8" or s.system.platform != "gpu":
        return None
    part = accelerator_of(s.system.accelerator, s.system.name)
    if part is None or part.mxfp8:
        return None
    return f"FP8_RECIPE=mxfp8: {part.name} has no MXFP8 units; set FP8_RECIPE=delayed, tensorwise or blockwise"


@rule
def part_has_nvfp4(s: Settings) -> str | None:
    if not s.precision.fp4 or s.system.platform != "gpu":
        return None
    part = accelerator_of(s.system.accelerator, s.system.name)
    return None if part is None or part.nvfp4 else f"FP4=1: {part.name} has no NVFP4 units; set FP8=1 instead"


@rule
def bf16_layers_need_a_recipe_by_layer(s: Settings) -> str | None:
    p = s.precision
    first, last = p.first_bf16_layers, p.last_bf16_layers
    if not (first or last):
        return None
    asked = f"BF16_FIRST_LAYERS={first} BF16_LAST_LAYERS={last}"
    if not (p.fp8 or p.fp4):
        return f"{asked}: need FP8=1 or FP4=1: all layers are bf16; unset them"
    if p.fp8_weights or p.fp4_weights:
        return f"{asked}: contradict FP8_PARAMS=1 and FP4_PARAMS=1: their weights must stay bf16; set both to 0"
    if p.fp8_recipe == "delayed" and (p.fp8 or p.fp4_heal_step):
        return f"{asked}: contradict FP8_RECIPE=delayed, which Megatron enters once for all layers; set another recipe"
    return None


# ---- Kernels ---------------------------------------------------------------------------------------------------------


def needs_a_gpu(variable: str, value: object) -> Rule:
    def check(s: Settings) -> str | None:
        if s.system.platform == "gpu" or s.value(variable) != value:
            return None
        text = int(value) if isinstance(value, bool) else value
        return f"{variable}={text}: needs PLATFORM=gpu: it has no CPU kernel; unset it"

    return check


RULES += [needs_a_gpu("CROSS_ENTROPY", "te"), needs_a_gpu("OP_FUSER", True)]


@rule
def op_fuser_has_the_mlp_to_itself(s: Settings) -> str | None:
    if not s.kernels.op_fuser:
        return None
    if s.parallel.tp > 1:
        return f"OP_FUSER=1: needs TP=1, not {s.parallel.tp}: it has no overlap and no saving there; set it to 0"
    if s.performance.recompute != "none" or s.performance.offload_layers:
        return "OP_FUSER=1: contradicts RECOMPUTE and CPU_OFFLOAD_LAYERS, which do not reach into it; unset them"
    if s.precision.fp4_heal_step:
        return f"OP_FUSER=1: contradicts FP4_HEAL_STEP={s.precision.fp4_heal_step}: it keeps the weights it has met first"
    return None


@rule
def double_buffer_needs_offload(s: Settings) -> str | None:
    if s.kernels.offload_double_buffer and not s.performance.offload_layers:
        return "OFFLOAD_DOUBLE_BUFFER=1: needs CPU_OFFLOAD_LAYERS: there is nothing to buffer"
    return None


# ---- CUDA graphs -----------------------------------------------------------------------------------------------------


@rule
def graphs_need_one_stage(s: Settings) -> str | None:
    if s.performance.graphs != "none" and s.parallel.pp > 1:  # p2p_communication.py, batch_p2p_sync
        return f"CUDA_GRAPHS={s.performance.graphs}: needs PP=1, not {s.parallel.pp}: Megatron's stages wait on the host"
    return None


def outside_of_graphs(variable: str, off: object) -> Rule:
    def check(s: Settings) -> str | None:
        if s.performance.graphs == "none" or (value := s.value(variable)) == off:
            return None
        return f"CUDA_GRAPHS={s.performance.graphs}: contradicts {variable}={value}: no graph has it; unset one of them"

    return check


def warmed_for_graphs(variable: str, kinds: tuple[str, ...]) -> Rule:
    def check(s: Settings) -> str | None:
        if s.performance.graphs not in kinds or (count := s.value(variable)) >= 2:
            return None
        return f"CUDA_GRAPHS={s.performance.graphs}: contradicts {variable}={count}: the second makes the graphs; set 2"

    return check


RULES += [outside_of_graphs("RECOMPUTE", "none"), outside_of_graphs("CPU_OFFLOAD_LAYERS", 0)]
RULES += [
    warmed_for_graphs("WARMUP_TRAIN_STEPS", ("layer", "iteration")),
    warmed_for_graphs("WARMUP_VALIDATION_STEPS", ("iteration",)),
]


# ---- What is observed ------------------------------------------------------------------------------------------------


def window_of_steps(variable: str) -> Rule:
    def check(s: Settings) -> str | None:
        try:
            steps = window(text := s.value(variable))
        except ValueError as error:
            return f"{variable}={text}: {error}"
        if steps and steps[-1] > (most := s.optimization.max_steps):
            return f"{variable}={text}: must end at MAX_STEPS={most} at the latest"
        return None

    return check


RULES += [window_of_steps(variable) for variable in ("OBSERVE_NSYS", "OBSERVE_PROFILE")]


@rule
def observed_ranks(s: Settings) -> str | None:
    ranks, world = s.observe.ranks, s.system.nodes * s.system.gpus_per_node
    if all(rank.isdecimal() and int(rank) < world for rank in ranks.split(",")):
        return None
    return f"OBSERVE_RANKS={ranks}: must be ranks below {world}, separated by commas"


@rule
def one_profiler(s: Settings) -> str | None:
    if s.observe.nsys_steps and s.observe.profile_steps:
        return f"OBSERVE_PROFILE={s.observe.profile_steps}: contradicts OBSERVE_NSYS: both want CUPTI; unset one of them"
    return None


def observed_on_a_gpu(variable: str) -> Rule:
    def check(s: Settings) -> str | None:
        if s.system.platform == "gpu" or not s.value(variable):
            return None
        return f"{variable}={s.value(variable)}: needs PLATFORM=gpu; on a CPU, OBSERVE_PROFILE and OBSERVE_STEP_TIMES serve"

    return check


RULES += [observed_on_a_gpu(variable) for variable in ("OBSERVE_NSYS", "OBSERVE_MEMORY")]


# ---- Rules of the closed division ------------------------------------------------------------------------------------


def fixed_in_closed(variable: str) -> Rule:
    def check(s: Settings) -> str | None:
        if s.submission.division != "closed" or s.rehearsal:
            return None
        fixed, value = FIXED_IN_CLOSED[variable], s.value(variable)
        if value == fixed:
            return None
        fix = f"set it to {fixed}" if fixed is not None else "unset it"
        return f"{variable}={value}: is fixed by the closed division; {fix} or MLPERF_DIVISION=open"

    return check


RULES += [fixed_in_closed(variable) for variable in FIXED_IN_CLOSED]
