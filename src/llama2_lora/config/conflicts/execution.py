"""Kernels, CUDA graphs and what is observed: how the work is done."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llama2_lora.config.conflicts.rule import Rule, Rules
from llama2_lora.config.values import window

if TYPE_CHECKING:
    from llama2_lora.config.settings import Settings

RULES = rule = Rules()


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
        return f"CUDA_GRAPHS={s.performance.graphs}: contradicts {variable}={count}: graphs are made in the first two; set 2"

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
