"""A rule: a function of the settings that names variable, value, reason and fix, or returns None.

One that reads a setting without a legal value is passed over; all others still speak. So a rule is a function of its own, and
reads nothing that it does not need.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llama2_lora.config.settings import Settings

Rule = Callable[["Settings"], "str | None"]


class Rules(list[Rule]):
    """A file's rules, in reading order; called, it decorates one."""

    def __call__(self, check: Rule) -> Rule:
        self.append(check)
        return check
