"""Private names of libraries: marked where used, listed in docs/internals.md, and named here when an upgrade drops one.

A mark is a comment `# PRIVATE: PACKAGE VERSION NAME`, NAME with its module: the test imports the module and follows the name.
"""

from __future__ import annotations

import importlib
import inspect
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
            found = getattr(found, attribute) if hasattr(found, attribute) else instance_attribute(found, attribute)
        return found
    raise ModuleNotFoundError(name)


def instance_attribute(kind: object, attribute: str) -> str:
    """The attribute's name, where a method of the class or of its bases mentions it."""
    package = getattr(kind, "__module__", "").split(".")[0]
    sources = [inspect.getsource(base) for base in getattr(kind, "__mro__", ()) if base.__module__.split(".")[0] == package]
    if not any(re.search(rf"\.{attribute}\b", source) for source in sources):
        raise AttributeError(f"{kind} has no {attribute}")
    return attribute


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
