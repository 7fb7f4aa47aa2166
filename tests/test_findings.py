"""What every check's result has in common: order, printing, exit status."""

from __future__ import annotations

import pytest

from llama2_lora.findings import Finding, at_least, count, exit_status, one_line, show, worst_first

FOUND = [Finding(level, f"{level} check", "text") for level in ("ok", "warning", "fatal", "note", "unknown", "error", "ok")]


def test_worst_first_and_stable() -> None:
    twice = [*FOUND, Finding("error", "second", "text")]
    assert [f.level for f in worst_first(twice)] == ["fatal", "error", "error", "warning", "unknown", "note", "ok", "ok"]
    assert [f.code for f in worst_first(twice) if f.level == "error"] == ["error check", "second"]


@pytest.mark.parametrize(
    ("level", "stops_at", "status"),
    [
        ("ok", "error", 0),
        ("unknown", "error", 0),
        ("warning", "error", 0),
        ("error", "error", 1),
        ("fatal", "error", 1),
        ("error", "fatal", 0),
        ("fatal", "fatal", 1),
        ("warning", "warning", 1),
    ],
)
def test_exit_status(level: str, stops_at: str, status: int) -> None:
    assert exit_status([Finding("ok", "a", "b"), Finding(level, "c", "d")], stops_at) == status
    assert exit_status([]) == 0


def test_printed_lines(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("rich")
    show([Finding("note", "later", "x"), Finding("error", "memory", "too much", "node1"), Finding("ok", "clock", "x")])
    assert capsys.readouterr().out == "error: node1: too much [memory]\nnote: x [later]\n"


def test_long_lines_and_markup_stay_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("rich")
    text = "[bold]" + "x" * 300 + " :smile:"
    show([Finding("error", "a", text)])
    assert capsys.readouterr().out == f"error: {text} [a]\n"


def test_a_finding_is_one_line() -> None:
    """A newline in somebody's value must not look like a line of ours."""
    assert str(Finding("error", "a", "LR=1\n:::MLLOG {}\r\x1b[2J")) == r"error: LR=1\n:::MLLOG {}\r\x1b[2J [a]"
    assert one_line("7" * 400) == "7" * 120 + "... (400 characters)"


def test_count() -> None:
    assert count([*FOUND, Finding("warning", "w", "t")]) == "1 fatal, 1 error, 2 warnings, 1 unknown, 1 note, 2 ok"
    assert count([]) == ""
    assert [f.level for f in at_least(FOUND, "error")] == ["fatal", "error"]
