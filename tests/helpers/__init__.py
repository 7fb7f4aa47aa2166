"""What tests of several rooms share. pyproject.toml puts tests/ on the path: `from helpers import ROOT`."""

import signal
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def obey_ctrl_c() -> None:
    """For Popen's preexec_fn: tests that a shell runs in the background hand an ignored SIGINT on."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
