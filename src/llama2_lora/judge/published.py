"""How published runs converged: data/envelope.csv, made of their logs by benchmarks/envelope.py; the file names its source."""

from __future__ import annotations

import csv
import functools
import io
from dataclasses import dataclass
from importlib import resources

WHOLE_SHARE = 0.95  # of the runs: where fewer still run, the slow ones are left and their median is no median of all


@dataclass(frozen=True)
class EnvelopeRow:
    """Evaluation loss of published runs with one GBS and precision after `sequences` training sequences, nats."""

    gbs: int
    precision: str  # fp8, or fp4: NVFP4 and then FP8
    rounds: str
    schedule: str  # rules, or other: of runs that evaluated at other points than the rules'
    sequences: int
    runs: int
    running: int  # of them, those that had not stopped before
    p05: float
    median: float
    p95: float
    share_converged: float

    @property
    def whole(self) -> bool:
        """Whether nearly all runs were still there and kept the schedule: what a run may be compared with."""
        return self.schedule == "rules" and self.running >= WHOLE_SHARE * self.runs


def envelope(gbs: int | None, precision: str | None = "fp8") -> list[EnvelopeRow]:
    """Published convergence for a GBS; empty where none was published. A precision that is not known counts as FP8."""
    wanted = "fp4" if precision == "fp4" else "fp8"
    return [row for row in _all_envelopes() if (row.gbs, row.precision) == (gbs, wanted)]


def label(rows: list[EnvelopeRow]) -> str:
    """What an envelope is made of, for a legend."""
    row = rows[0]
    precision = {"fp8": "FP8", "fp4": "FP4, then FP8"}[row.precision]
    rounds = row.rounds.split()
    span = rounds[0] if len(rounds) == 1 else f"{rounds[0]} to {rounds[-1]}"
    odd = "" if row.schedule == "rules" else ", evaluated off the rules' schedule"
    return f"{row.runs} published NVIDIA runs, GBS {row.gbs}, {precision}, {span}{odd}"


@functools.cache
def _all_envelopes() -> tuple[EnvelopeRow, ...]:
    text = (resources.files("llama2_lora.judge") / "data" / "envelope.csv").read_text()
    rows = csv.DictReader(io.StringIO("".join(x for x in text.splitlines(True) if not x.startswith("#"))))
    return tuple(_row(row) for row in rows)


def _row(row: dict[str, str]) -> EnvelopeRow:
    kinds = EnvelopeRow.__dataclass_fields__
    cast = {"int": int, "float": float, "str": str}
    return EnvelopeRow(**{name: cast[str(kinds[name].type)](text) for name, text in row.items()})
