"""The pages: links and files exist, each says who needs it, the README is one sitting, and commands print what a page shows."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import rich  # noqa: F401  the commands print with it

from helpers import ROOT
from helpers.run_text import write_result
from helpers.training_runs import clean_environment

TOPICS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "tests/README.md", *TOPICS]
TREES = r"(?:scripts|src|benchmarks|tests|docs|\.ci)/[\w./-]*\w|config_[A-Za-z0-9]\w*\.sh"
ROOMS = r"(?:config|data|hub|weights|node|forecast|judge|rehearsal|training)/[\w/]+\.(?:py|csv)"
# What is run here: quick, without a GPU, a network or a cluster. They run where the README's reader is, in a clone.
RUN = {
    "forecast.md": ["scripts/preflight.py config_DGXH100_1x8x4.sh"],
    "launch.md": [
        "DATADIR=/data/gov_report MODEL=/data/model LOGDIR=logs CONT=none DRY_RUN=1 scripts/run_docker.sh config_CPU_1x2x4.sh"
    ],
    "logs.md": ["scripts/package_submission.py LOGDIR --system my_system.json --output submission"],
    "rehearsal.md": [
        "python scripts/rehearsal_data.py --output own/data --text notes",
        "source config_GB200_2x4x2.sh && PYTHONPATH=src python -m llama2_lora.config.reduced",
    ],
}


def named(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def anchors(page: Path) -> set[str]:
    """Of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), flags=re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links(page: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    broken = []
    for link in links:
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_named_files(page: Path) -> None:
    text = page.read_text()
    names = [ROOT / name for name in re.findall(rf"(?<![\w./<:-])(?:{TREES})", text)]
    names += [ROOT / "src/llama2_lora" / name for name in re.findall(rf"(?<![\w./-]){ROOMS}", text)]
    placeholders = {"config_X.sh"}
    assert [named(name) for name in names if not name.exists() and name.name not in placeholders] == []


@pytest.mark.parametrize("page", TOPICS, ids=named)
def test_a_page_begins_with_who_needs_it(page: Path) -> None:
    title, empty, reader = page.read_text().splitlines()[:3]
    assert title.startswith("# ")
    assert empty == ""
    assert reader.startswith("*For ")


def test_the_readme_is_one_sitting() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 250
    assert len(text.split()) <= 2600


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A folder that looks like a clone, so that nothing is written into this one; with ten logs and some text of one's own."""
    for path in ROOT.iterdir():
        if path.name not in ("rehearsal", "logs", "results"):
            (tmp_path / path.name).symlink_to(path)
    (tmp_path / "LOGDIR").mkdir()
    write_result(tmp_path / "LOGDIR")
    (tmp_path / "notes").mkdir()
    paragraphs = (" ".join(f"{i * j % 97} bridges" for j in range(1, 31)) + "." for i in range(240))
    (tmp_path / "notes/a.txt").write_text("\n\n".join(paragraphs))
    return tmp_path


def matches(shown: str, printed: str) -> bool:
    """Is it what the page shows? Three dots stand for anything, a line of them for any lines; spaces at a line's end differ."""
    pattern = (
        re.escape(shown.strip() + "\n").replace(r"\.\.\.", "...").replace("\n...\\\n", "\n(?:.*\n)*?").replace("...", ".*")
    )
    return re.fullmatch(pattern, "\n".join(line.rstrip() for line in printed.splitlines()) + "\n") is not None


@pytest.mark.parametrize(("page", "command"), [(page, command) for page, all_ in RUN.items() for command in all_], ids=str)
def test_commands_print_what_the_page_shows(page: str, command: str, clone: Path) -> None:
    blocks = re.findall(r"^```console\n\$ (.+)\n((?:.*\n)*?)```$", (ROOT / "docs" / page).read_text(), flags=re.M)
    shown = dict(reversed(blocks))[command]  # the first of its kind
    env = clean_environment(PYTHONUNBUFFERED="1")  # both outputs in the order in which they were written
    env.pop("PYTHON", None)
    env["PATH"] = f"{Path(sys.executable).parent}:{env['PATH']}"
    done = subprocess.run(
        ["bash", "-c", f"({command}) 2>&1"], cwd=clone, env=env, stdout=subprocess.PIPE, text=True, timeout=120
    )
    assert matches(shown, done.stdout), f"docs/{page} shows\n{shown}\nbut the command prints\n{done.stdout}"


@pytest.mark.parametrize("script", sorted([*(ROOT / "scripts").glob("*.py"), *(ROOT / "scripts").glob("*.sh")]), ids=named)
def test_help_says_what_a_script_is_for(script: Path) -> None:
    """In the words of its first lines, and nothing else happens."""
    program = "bash" if script.suffix == ".sh" else sys.executable
    done = subprocess.run([program, script, "--help"], env=clean_environment(), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert script.read_text().splitlines()[1].strip('# "') in done.stdout
