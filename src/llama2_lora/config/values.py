"""Text of environment variables -> values of a dataclass's fields. A field's type chooses the parser.

A field's metadata: variable; choices; low and high, inclusive; beside, a variable with which this one is required; doc.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, Field, field, fields
from typing import Any

from llama2_lora.findings import one_line

MOST = 10**6  # of anything that is counted, where a field says nothing else


class SettingsError(ValueError):
    """Every problem of an environment, one per line: variable, value, rule, fix."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(self.problems))


def setting(
    variable: str,
    default: Any = MISSING,
    doc: str = "",
    *,
    unit: str = "",
    choices: tuple[str, ...] = (),
    low: float | None = None,
    high: float | None = None,
    beside: str = "",  # required where this variable is set
) -> Any:
    """A dataclass field that is read from an environment variable."""
    metadata = dict(variable=variable, doc=doc, unit=unit, choices=choices, low=low, high=high, beside=beside)
    return field(default=default, metadata=metadata) if default is not MISSING else field(metadata=metadata)


def _boolean(text: str) -> bool:
    known = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}
    try:
        return known[text.strip().lower()]
    except KeyError:
        raise ValueError("must be 0 or 1") from None


def _integer(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError("must be an integer") from None


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError("must be a finite number")
    return value


def _text(text: str) -> str:
    if not text.isprintable():  # a line break could pass for a line of the log
        raise ValueError("must be printable text on one line")
    return text


PARSERS: dict[str, Callable[[str], Any]] = {"bool": _boolean, "int": _integer, "float": _number, "str": _text}


def window(text: str) -> range:
    """Steps FIRST-LAST, both inclusive; empty for an empty text. ValueError for any other."""
    if not text:
        return range(0)
    match = re.fullmatch(r"(\d{1,7})-(\d{1,7})", text, re.ASCII)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise ValueError("must be FIRST-LAST, such as 100-104")
    return range(int(match[1]), int(match[2]) + 1)


def walltime_minutes(text: str) -> float:
    """Minutes in one of Slurm's time formats: M, M:S, H:M:S, D-H, D-H:M or D-H:M:S (sbatch(1), --time)."""
    match = re.fullmatch(r"(?:(\d{1,4})-)?(\d{1,6})(?::(\d{1,4}))?(?::(\d{1,4}))?", text.strip(), re.ASCII)
    if not match:
        raise ValueError("must be a Slurm time such as 45, 45:00, 1:30:00 or 1-12:00")
    days, *parts = (int(group) if group is not None else None for group in match.groups())
    a, b, c = (part or 0 for part in parts)
    if days is not None:
        return days * 1440 + a * 60 + b + c / 60
    return a * 60 + b + c / 60 if parts[2] is not None else a + b / 60


def parse_group(group: type, env: Mapping[str, str], problems: list[str]) -> Any:
    """A group of settings, without the fields that have no legal value: to read one raises AttributeError."""
    parsed: Any = object.__new__(group)
    for f in fields(group):
        variable, text, beside = f.metadata["variable"], env.get(f.metadata["variable"], ""), f.metadata["beside"]
        if text != "":
            try:
                object.__setattr__(parsed, f.name, _parse_value(f, text))
            except ValueError as error:
                problems.append(f"{variable}={one_line(text)}: {error}")
        elif beside and env.get(beside):  # an empty variable means unset, as in most shell scripts
            problems.append(f"{variable}: is not set, but {beside} is: the launcher sets both for every rank, or neither")
        elif f.default is MISSING:
            problems.append(f"{variable}: is not set: {f.metadata['doc']}; source a config_*.sh")
        else:
            object.__setattr__(parsed, f.name, f.default)
    return parsed


def type_name(f: Field[Any]) -> str:
    return str(f.type).removesuffix(" | None")


def _parse_value(f: Field[Any], text: str) -> Any:
    meta, kind = f.metadata, type_name(f)
    value = PARSERS[kind](text)
    high = MOST if kind == "int" and meta["high"] is None else meta["high"]
    if meta["choices"] and value not in meta["choices"]:
        raise ValueError(f"must be one of {', '.join(c for c in meta['choices'] if c)}")
    if meta["low"] is not None and value < meta["low"]:
        raise ValueError(f"must be at least {meta['low']}")
    if high is not None and value > high:
        raise ValueError(f"must be at most {high}")
    return value
