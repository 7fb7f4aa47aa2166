"""Private names of libraries: marked where used, listed in docs/internals.md, and named here when an upgrade drops one.

A mark is a comment `# PRIVATE: PACKAGE VERSION NAME`, NAME with its module: the test imports the module and follows the name.
"""

from __future__ import annotations

import importlib
import re
from importlib.metadata import version

import pytest

from helpers import ROOT

MARK = re.compile(r"# PRIVATE: (\S+) (\S+) (\S+)")
MARKS = sorted({found for path in (ROOT / "src").rglob("*.py") for found in MARK.findall(path.read_text())})


def resolve(name: str) -> object:
    """The object of a dotted name: the longest prefix that can be imported, then attributes."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found: object = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for attribute in parts[length:]:
            found = getattr(found, attribute)
        return found
    raise ModuleNotFoundError(name)


def test_the_marks_are_found() -> None:
    assert len(MARKS) >= 5


@pytest.mark.parametrize(("package", "tested", "name"), MARKS)
def test_the_installed_library_still_has_it(package: str, tested: str, name: str) -> None:
    if package not in ("python", "transformer_engine"):
        assert version(package).startswith(tested), f"{package} is {version(package)}: look at {name}, then change its mark"
    try:
        resolve(name)
    except (ModuleNotFoundError, AttributeError) as error:
        raise AssertionError(f"{package} {version(package)} has dropped {name}, which was in {tested}") from error


def test_a_dropped_name_is_noticed() -> None:
    with pytest.raises(AttributeError):
        resolve("lightning.pytorch.strategies.Strategy._no_such_name")


@pytest.mark.parametrize(("package", "tested", "name"), MARKS)
def test_the_table_lists_it(package: str, tested: str, name: str) -> None:
    rows = (ROOT / "docs/internals.md").read_text()
    assert f"| `{name}` | {package} {tested} |" in rows, f"docs/internals.md: add `{name}`, {package} {tested}"


def test_the_table_lists_nothing_else() -> None:
    listed = re.findall(r"^\| `(\S+)` \| (\S+) (\S+) \|", (ROOT / "docs/internals.md").read_text(), flags=re.M)
    assert sorted(listed) == sorted((name, package, tested) for package, tested, name in MARKS)
