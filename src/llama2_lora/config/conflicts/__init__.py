"""What excludes what (rule.py says what a rule is)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from llama2_lora.config.conflicts import closed, execution, layout, precision

if TYPE_CHECKING:
    from llama2_lora.config.settings import Settings

RULES = (*layout.RULES, *precision.RULES, *execution.RULES, *closed.RULES)


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
