"""Power, clocks and temperature of this node's GPUs, in mlperf_logging's power dialect (judge/power.py reads it).

    python src/llama2_lora/node/power.py FILE SECONDS

A process of its own beside the rank that starts it (training/observe.py): a line on stdin starts the measurement, the end
of stdin ends it, so it cannot outlive that rank. It needs nvidia-smi and nothing of this package. A reading is the sum over
the node's GPUs, in watts: of the GPUs alone, not at the wall.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

SOURCE = "nvidia-smi, GPUs alone"
FIELDS = {"power.draw": "watts", "clocks.sm": "sm_mhz", "temperature.gpu": "celsius"}


def command(seconds: float) -> list[str]:
    query = f"--query-gpu=index,{','.join(FIELDS)}"
    return ["nvidia-smi", query, "--format=csv,noheader,nounits", f"--loop-ms={max(1, round(seconds * 1000))}"]


def sample(file: Path, seconds: float) -> None:
    """Wait for the start, then write until the end. Raises OSError where there is no nvidia-smi or FILE cannot be written."""
    with subprocess.Popen(command(seconds), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as smi:
        assert smi.stdout
        try:
            if not sys.stdin.readline():
                return
            os.set_blocking(smi.stdout.fileno(), False)
            smi.stdout.read()  # what was printed before the start
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.open("w") as out:
                _write(out, "power_measurement_start", None, {"source": SOURCE})
                _record(out, smi.stdout)
                _write(out, "power_measurement_stop", None, {})
        finally:
            smi.kill()


def _record(out: TextIO, pipe: Any) -> None:
    """Write a reading whenever all GPUs have been printed once more, until stdin or nvidia-smi ends."""
    readings: dict[int, list[float | None]] = {}
    for line in _lines(pipe):
        if (parsed := parse(line)) is None:
            continue
        index, values = parsed
        if index in readings:
            _flush(out, readings)
            readings = {}
        readings[index] = values
    _flush(out, readings)


def _lines(pipe: Any) -> Iterator[str]:
    rest = b""
    while True:
        ready, _, _ = select.select([pipe, sys.stdin], [], [])
        if sys.stdin in ready:
            return
        chunk = pipe.read()
        if not chunk:
            return
        *whole, rest = (rest + chunk).split(b"\n")
        for line in whole:
            yield line.decode(errors="replace")


def parse(line: str) -> tuple[int, list[float | None]] | None:
    """(index, [watts, MHz, degrees]) of one line of nvidia-smi; None for a value that it does not tell, such as [N/A]."""
    index, *fields = (field.strip() for field in line.split(","))
    if not index.isdigit() or len(fields) != len(FIELDS):
        return None
    return int(index), [float(f) if f.replace(".", "", 1).isdigit() else None for f in fields]


def _flush(out: TextIO, readings: dict[int, list[float | None]]) -> None:
    columns = dict(zip(FIELDS.values(), zip(*(readings[i] for i in sorted(readings)), strict=True), strict=False))
    watts = [w for w in columns.get("watts", ()) if w is not None]
    if watts:
        _write(out, "power_reading", round(sum(watts), 1), {name: list(values) for name, values in columns.items()})


def _write(out: TextIO, key: str, value: float | None, metadata: dict[str, Any]) -> None:
    event = {"namespace": "", "time_ms": time.time_ns() // 10**6, "event_type": "POINT_IN_TIME", "key": key, "value": value}
    print(f":::MLLOG {json.dumps(event | {'metadata': metadata})}", file=out, flush=True)


if __name__ == "__main__":
    try:
        sample(Path(sys.argv[1]), float(sys.argv[2]))
    except OSError as error:  # the run goes on without
        sys.exit(f"error: OBSERVE_POWER: {error}")
