"""How published runs converged: data/envelope.csv, made of their logs; the file names its source."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from importlib import resources


@dataclass(frozen=True)
class EnvelopeRow:
    """Evaluation loss of published runs with one GBS after `sequences` training sequences, nats."""

    gbs: int
    sequences: int
    runs: int
    p05: float
    median: float
    p95: float
    share_converged: float


def envelope(gbs: int | None) -> list[EnvelopeRow]:
    """Published convergence for a GBS; empty where none was published."""
    return [row for row in _all_envelopes() if row.gbs == gbs]


_envelopes: list[EnvelopeRow] = []


def _all_envelopes() -> list[EnvelopeRow]:
    if not _envelopes:
        text = (resources.files("llama2_lora.judge") / "data" / "envelope.csv").read_text()
        for row in csv.DictReader(io.StringIO("".join(x for x in text.splitlines(True) if not x.startswith("#")))):
            whole = (int(row[name]) for name in ("gbs", "sequences", "runs"))
            shares = (float(row[name]) for name in ("p05", "median", "p95", "share_converged"))
            _envelopes.append(EnvelopeRow(*whole, *shares))
    return _envelopes
