"""FP8, FP4 and bf16: what a part has, and what goes together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llama2_lora.config.conflicts.rule import Rule, Rules
from llama2_lora.gpus import accelerator_of

if TYPE_CHECKING:
    from llama2_lora.config.settings import Settings

RULES = rule = Rules()


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
