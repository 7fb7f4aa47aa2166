"""The pictures of the pages, in docs/images: the summary of a round, preflight and the rehearsal in a terminal.

    scripts/rehearse.sh | tee /tmp/rehearsal.txt
    python benchmarks/screenshots.py --rehearsal /tmp/rehearsal.txt

Needs Chromium. The round is made up, by the tests' writer of logs: its numbers mean nothing.
"""

from __future__ import annotations

import argparse
import io
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image
from rich.console import Console
from rich.text import Text

ROOT = Path(__file__).resolve().parents[1]
IMAGES = ROOT / "docs/images"
COLUMNS, PIXELS_PER_COLUMN = (80, 150), 8.2
sys.path.insert(0, str(ROOT / "tests"))
from helpers.run_text import CONVERGING, write_run  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rehearsal", type=Path, metavar="FILE", help="what scripts/rehearse.sh printed")
    log = parser.parse_args().rehearsal
    with tempfile.TemporaryDirectory() as folder:
        page = round_page(Path(folder))
        shoot(page.as_uri(), IMAGES / "round.png", 1280, 780)
        config = "config_DGXH100_1x8x4.sh"
        terminal(f"$ scripts/preflight.py {config}\n" + printed("scripts/preflight.py", config), "preflight", Path(folder))
        if log:
            terminal("$ scripts/rehearse.sh" + log.read_text(), "rehearsal", Path(folder))


def printed(*command: str) -> str:
    """What a script prints to a terminal, escapes included."""
    given = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT / "src")}
    submitter = {"MLPERF_SUBMITTER": "Your Organization", "MLPERF_SYSTEM_NAME": "Your system", "MLPERF_STATUS": "onprem"}
    env = given | submitter | {"FORCE_COLOR": "1", "COLUMNS": "120"}
    return subprocess.run([sys.executable, *command], env=env, cwd=ROOT, stdout=subprocess.PIPE, text=True).stdout


def round_page(folder: Path) -> Path:
    """The summary page of four systems, ten runs each; some runs of the slower ones need an evaluation more."""
    for number, name in enumerate(("north", "east", "south", "west")):
        for trial in range(10):
            losses = tuple(loss + 0.0004 * ((trial * 7 + number) % 5 - 2) for loss in CONVERGING[:-1])
            losses = (*losses, *([0.9258] if trial < 3 * number else []), 0.9243 - 0.0002 * (trial % 3))
            log = folder / f"round/results/{name}_8xH100/llama2_70b_lora/result_{trial}.txt"
            write_run(log, seed=1 + trial, losses=losses, submission_org=name.title(), submission_platform=f"{name}_8xH100")
    page = folder / "round.html"
    command = [sys.executable, ROOT / "scripts/summarize.py", "round", "--html", page]
    subprocess.run(command, cwd=folder, stdout=subprocess.DEVNULL)
    return page


def terminal(text: str, name: str, folder: Path) -> None:
    """docs/images/NAME.png: the text as a terminal shows it."""
    lines = Text.from_ansi(text).split()
    for line in lines:
        line.rstrip()  # rich fills its tables' last column
    columns = max(COLUMNS[0], min(COLUMNS[1], max(line.cell_len + 1 for line in lines)))
    console = Console(record=True, width=columns, file=io.StringIO(), force_terminal=True)
    console.print(Text("\n").join(lines), "\n")  # else the last line is cut
    svg = console.export_svg(title=name)
    width, height = map(float, re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg).groups())
    shown = int(columns * PIXELS_PER_COLUMN)
    page = folder / f"{name}.html"
    page.write_text(f'<body style="margin:0"><div style="width:{shown}px">{svg}</div>')
    shoot(page.as_uri(), IMAGES / f"{name}.png", shown, round(height / width * shown))


def shoot(uri: str, picture: Path, width: int, height: int) -> None:
    command = [
        "chromium",
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        f"--window-size={width},{height}",
    ]
    subprocess.run([*command, f"--screenshot={picture}", uri], check=True, stderr=subprocess.DEVNULL, timeout=60)
    Image.open(picture).convert("RGB").quantize(48).save(picture, optimize=True)
    print(f"{picture.relative_to(ROOT)}: {picture.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
