#!/usr/bin/env python3
"""One rank of a config on one GPU: how long does its step take, what does it hold in memory, which kernels run?

    scripts/measure.py config_DGXH100_1x8x4.sh             all layers of the rank; writes measured_DGXH100_1x8x4.json
    scripts/measure.py config_DGXH100_1x8x4.sh --layers 4  4 and 2 layers, from which all are extrapolated
    scripts/measure.py config_CPU_1x2x4.sh                 the same code on a CPU, with the rehearsal's small model

It needs no checkpoint, no data set and no second GPU: weights are random, and collectives return at once, so every time is
without communication. scripts/preflight.py CONFIG --measured FILE makes a forecast of it.
Exit status: 0 measured, 1 not (no GPU, out of memory), 2 wrong usage, 130 interrupted, 143 terminated: the file has the
figures so far.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import NoReturn

from llama2_lora.config.settings import Settings
from llama2_lora.config.shell import source
from llama2_lora.findings import Finding, show
from llama2_lora.forecast.show import show_measured

INTERRUPTED, TERMINATED = 130, 143


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="config_*.sh")
    parser.add_argument("--layers", type=int, metavar="N", help="measure N layers and N/2, and extrapolate; default: all")
    parser.add_argument("--steps", type=int, default=10, metavar="K", help="steps to time (10)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: measured_<DGXSYSTEM>.json")
    arguments = parser.parse_args(argv)
    if arguments.steps < 1:
        parser.error(f"--steps {arguments.steps}: must be at least 1")
    if arguments.layers is not None and arguments.layers < 2:
        parser.error(f"--layers {arguments.layers}: must be at least 2: a line takes two points")
    return arguments


def rank_zero(config: Path) -> Settings:
    """The config as rank 0 of its world sees it; this process's environment becomes that rank's."""
    exports = source(config)
    settings = Settings.from_env(exports)
    world = settings.system.nodes * settings.system.gpus_per_node
    launcher = {"RANK": 0, "LOCAL_RANK": 0, "GROUP_RANK": 0, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": 1}
    exports |= {name: str(value) for name, value in launcher.items()} | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    os.environ.update(exports)  # noqa: TID251  libraries read some of a config's variables when they are imported
    return Settings.from_env(exports)


def platform(settings: Settings) -> AbstractContextManager[None]:
    if settings.system.platform == "gpu":
        return nullcontext()
    from llama2_lora.training.cpu import capability_for, cpu_platform

    return cpu_platform(capability_for(settings.precision))


def terminate(signum: int, frame: object) -> NoReturn:
    """Lightning calls a handler that is there at once. Its own waits for the end of a training batch, and here none ends."""
    raise SystemExit(TERMINATED)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    try:
        settings = rank_zero(arguments.config)
    except ValueError as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        return 2
    warnings.simplefilter("ignore")
    output = arguments.output or Path(f"measured_{settings.system.name}.json")
    status, session = 0, None
    signal.signal(signal.SIGTERM, terminate)
    try:
        from llama2_lora.training.measure_device import device_of

        device = device_of(settings)
        with platform(settings):
            from llama2_lora.training.measure import Session

            session = Session(settings, device, arguments.layers, arguments.steps, output)
            session.run()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        status = 1
    except (KeyboardInterrupt, SystemExit) as stop:  # Lightning turns the first into the second
        status = TERMINATED if stop.args == (TERMINATED,) else INTERRUPTED
        print("terminated" if status == TERMINATED else "interrupted", file=sys.stderr)
    if session and session.found.passes:
        show_measured(session.found, session.account, session.rates())
        forecast = f"{output} is written; forecast: scripts/preflight.py {arguments.config} --measured {output}"
        show([*session.findings, Finding("note", "measured", forecast)])
    return status


if __name__ == "__main__":
    raise SystemExit(main())
