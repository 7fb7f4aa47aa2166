"""Time of scripts/summarize.py on many logs: copies of one folder of ten, other seeds and folders.

python benchmarks/summarize.py LOGDIR [copies]     LOGDIR: ten logs; 100 copies are 1,000 logs
"""

from __future__ import annotations

import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "summarize.py"


def main() -> None:
    source, copies = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 100
    logs = sorted(f for f in source.iterdir() if f.suffix in (".txt", ".log"))
    for layout in ("one folder", "one folder per ten"):
        with tempfile.TemporaryDirectory() as folder:
            for copy in range(copies):
                target = Path(folder, f"system_{copy}" if layout != "one folder" else "")
                target.mkdir(exist_ok=True)
                for log in logs:
                    text = re.sub(r'"seed", "value": (\d+)', rf'"seed", "value": \g<1>{copy}', log.read_text())
                    Path(target, f"result_{copy}_{log.name}").write_text(text)
            for options in ([], ["--html", str(Path(folder, "page.html"))]):
                started, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
                command = [sys.executable, SCRIPT, folder, "--json", *options]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                seconds = time.perf_counter() - started
                cpu = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before
                what = f"{copies * len(logs)} logs, {layout}, {' '.join(options[:1]) or 'JSON alone'}"
                print(f"{what}: {seconds:.1f} s, {cpu:.1f} s of CPU, exit {done.returncode}")


if __name__ == "__main__":
    main()
