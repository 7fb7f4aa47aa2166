"""What runs cost: GPU-hours, money where a price is given, energy where the power is known or given."""

from __future__ import annotations

import argparse
from dataclasses import dataclass


@dataclass(frozen=True)
class Rates:
    """What a user gives. None: not given."""

    gpu_hour_price: float | None = None  # in any currency
    gpu_watts: float | None = None  # mean power of a GPU with its share of the node


@dataclass(frozen=True)
class Cost:
    """Of any number of runs. None: not known."""

    gpu_hours: float
    money: float | None = None
    energy_kwh: float | None = None

    def __str__(self) -> str:
        parts = [f"{self.gpu_hours:,.3g} GPU-hours" if self.gpu_hours < 1000 else f"{self.gpu_hours:,.0f} GPU-hours"]
        parts += [] if self.money is None else [f"{self.money:,.2f} in money"]
        parts += [] if self.energy_kwh is None else [f"{self.energy_kwh:,.3g} kWh"]
        return ", ".join(parts)


def cost(gpu_hours: float, rates: Rates, measured_kwh: float | None = None) -> Cost:
    """A measured energy counts before one that is reckoned from `gpu_watts`."""
    money = None if rates.gpu_hour_price is None else gpu_hours * rates.gpu_hour_price
    reckoned = None if rates.gpu_watts is None else gpu_hours * rates.gpu_watts / 1e3
    return Cost(gpu_hours, money, reckoned if measured_kwh is None else measured_kwh)


def positive(text: str) -> float:
    """A number from a command line."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError("must be above 0")
    return value
