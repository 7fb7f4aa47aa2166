"""One shape for whatever a check has to say, one printer, one rule for the exit status.

    findings = [Finding("warning", "memory", "memory is tight: 82.1 GB are needed"), ...]
    show(findings)                  # warning: memory is tight: 82.1 GB are needed [memory]
    return exit_status(findings)    # 0: nothing is an error

A check yields a Finding for what is well too ("ok"), so that a table of all checks and the list of problems come from one
list.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from llama2_lora.packages import missing_package_named

# Worst first. fatal: an error that no mode overrules; unknown: it could not be checked.
LEVELS = ("fatal", "error", "warning", "unknown", "note", "ok")
STYLES = {"fatal": "bold red", "error": "bold red", "warning": "yellow"}
PIPE_WIDTH = 140  # columns where the output is no terminal
LONGEST_VALUE = 120  # characters of somebody's input that a message repeats


@dataclass(frozen=True)
class Finding:
    """One thing that one check found out."""

    level: str  # one of LEVELS
    code: str  # stable name of the check
    text: str
    where: str = ""  # node, file, file:line, variable or paragraph of the rules; empty: the whole

    def __post_init__(self) -> None:
        assert self.level in LEVELS, self.level

    def __str__(self) -> str:
        return one_line(": ".join(filter(None, (self.level, self.where, self.text))) + f" [{self.code}]", limit=None)


def one_line(text: str, limit: int | None = LONGEST_VALUE) -> str:
    """Text that stays on its line: control characters are escaped, so no value can look like a line of its own."""
    if limit is not None and len(text) > limit:
        text = f"{text[:limit]}... ({len(text)} characters)"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def worst_first(findings: Iterable[Finding]) -> list[Finding]:
    """By level; findings of one level stay in order."""
    return sorted(findings, key=lambda finding: LEVELS.index(finding.level))


def at_least(findings: Iterable[Finding], level: str) -> list[Finding]:
    """Findings as bad as `level`, or worse."""
    return [finding for finding in findings if LEVELS.index(finding.level) <= LEVELS.index(level)]


def count(findings: Iterable[Finding]) -> str:
    """How many of each level, such as `1 error, 2 warnings, 12 ok`."""
    found = Counter(finding.level for finding in findings)
    plural = {"error": "errors", "warning": "warnings", "note": "notes"}
    return ", ".join(f"{found[name]} {plural.get(name, name) if found[name] > 1 else name}" for name in LEVELS if found[name])


def show(findings: Iterable[Finding], least: str = "note") -> None:
    """Print those of at least this level, worst first, a line each; in colour on a terminal."""
    with missing_package_named():  # not at the top: where findings are only made, a bare clone has no rich
        from rich.console import Console

    console = Console(soft_wrap=True)
    for finding in at_least(worst_first(findings), least):
        console.print(str(finding), style=STYLES.get(finding.level), markup=False, highlight=False, emoji=False)


def exit_status(findings: Iterable[Finding], stops_at: str = "error") -> int:
    """1 where a finding is as bad as `stops_at`, or worse."""
    return int(bool(at_least(findings, stops_at)))
