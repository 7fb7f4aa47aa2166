"""What the closed division fixes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llama2_lora.config import rules
from llama2_lora.config.conflicts.rule import Rule, Rules

if TYPE_CHECKING:
    from llama2_lora.config.settings import Settings

RULES = rule = Rules()


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
