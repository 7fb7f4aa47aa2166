"""What tests of several rooms share. pyproject.toml puts tests/ on the path: `from helpers import ROOT`."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
