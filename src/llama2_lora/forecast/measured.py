"""What scripts/measure.py saw of one rank on one GPU: the file, and what it says of a whole run.

One rank knows the time of its own work and the memory of its own GPU. It knows nothing of the network: a forecast adds that
from the fitted constants of timing.py, and buffers for it from the account of memory.py.

A few layers stand for all: the time of a pass is a constant plus a part per layer, so two numbers of layers give both, and
what one layer holds in memory all of them hold.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, ClassVar

from llama2_lora.config.settings import Settings
from llama2_lora.findings import Finding
from llama2_lora.forecast.memory import Item, Memory

FORMAT = 2
NOT_FINITE = "values became infinite or NaN on the measured rank: such products draw less power, so times may be too short"
# What decides the work and the memory of one rank. TP_COMM_OVERLAP does not: it needs the other ranks.
DECIDING = (
    *("TP", "PP", "CP", "CP_COMM", "VAL_CP", "SP", "MINIBS", "MBS", "VAL_MBS", "MAX_SEQLEN", "LORA_RANK", "LORA_DROPOUT"),
    *("FP8", "FP8_RECIPE", "FP8_DPA", "FP8_PARAMS", "FP8_ACT", "FP4", "FP4_PARAMS", "RECOMPUTE", "CPU_OFFLOAD_LAYERS"),
    *("BF16_FIRST_LAYERS", "BF16_LAST_LAYERS", "CROSS_ENTROPY", "OP_FUSER"),
)


class Names:
    """Kinds of memory that can be told apart on a device. Beside each: the items of memory.py's account that it is."""

    OUTSIDE, LINEAR, COPIES = "embedding, output layer, norms", "linear weights", "FP8 copies and transposes"
    ADAPTER, GRADIENTS, ADAMW = "adapter", "adapter gradients", "AdamW state"
    NORMS, ATTENTION = "activations: linear_qkv, linear_fc1", "activations: attention"
    ADAPTERS_KEPT, SWIGLU, REST = "activations: adapters", "activations: MLP", "activations: rest of a layer"
    LOGITS = "logits and cross entropy"
    OF_ACCOUNT: ClassVar[dict[str, tuple[str, ...]]] = {
        OUTSIDE: ("embedding, output layer, norms",),
        LINEAR: ("linear weights",),
        COPIES: ("FP8 copies", "FP8 transposes", "FP4 copies"),
        ADAPTER: ("adapter (",),
        GRADIENTS: ("adapter gradients",),
        ADAMW: ("AdamW",),
        NORMS: ("activations: inputs of both norms",),
        ATTENTION: ("activations: query, key, value", "activations: attention output"),
        ADAPTERS_KEPT: ("activations: adapter",),
        SWIGLU: ("activations: SwiGLU",),
        REST: ("layer inputs", "one layer"),
        LOGITS: ("logits",),
    }
    ALL = tuple(OF_ACCOUNT)
    PER_LAYER = frozenset(ALL) - {OUTSIDE, LOGITS}


@dataclass(frozen=True)
class Pass:
    """One number of layers, timed. Seconds on this rank, with collectives that return at once."""

    layers: int
    step_seconds: list[float]  # of each optimizer step
    eval_seconds: float | None = None  # of a whole evaluation


@dataclass(frozen=True)
class MemoryItem:
    """Bytes of one kind on this rank; `per_layer`: each layer has its share of them."""

    name: str
    bytes: int
    per_layer: bool


@dataclass(frozen=True)
class MeasuredMemory:
    """Bytes of `layers` layers: `peak` that torch allocated, `slack` reserved above it, `outside` for context and libraries."""

    layers: int
    items: list[MemoryItem]
    peak: int | None = None  # bytes, None on a CPU
    slack: int = 0
    outside: int = 0


@dataclass(frozen=True)
class Kernel:
    """One kernel (on a CPU: operator) in one training step."""

    name: str
    seconds: float
    calls: int


@dataclass
class Measured:
    """One measurement, as far as it came. Grows while it runs; `complete` is its last word."""

    config: str
    gpu: str  # the device's own name
    accelerator: str  # key of ACCELERATORS, empty where the GPU is none of them
    model_layers: int  # of the whole model
    stage_layers: int  # of this rank's pipeline stage: what a run would have on it
    settings: dict[str, Any]
    software: dict[str, str]
    passes: list[Pass] = field(default_factory=list)  # most layers first
    memory: MeasuredMemory | None = None
    kernels: list[Kernel] = field(default_factory=list)
    collective_seconds: float | None = None  # in a step: copies that stand for all-gathers and reduce-scatters
    warmup_seconds: float | None = None
    finite: bool = True  # the adapter, after the last step
    complete: bool = False

    @property
    def step_seconds(self) -> float:
        """One optimizer step of a whole stage, without communication."""
        return self._whole({p.layers: median(p.step_seconds) for p in self.passes})

    @property
    def eval_seconds(self) -> float | None:
        found = {p.layers: p.eval_seconds for p in self.passes if p.eval_seconds is not None}
        return self._whole(found) if found else None

    @property
    def extrapolated(self) -> str:
        """Which layers stand for which; empty where all were measured."""
        layers = [p.layers for p in self.passes]
        return "" if self.stage_layers in layers else f"{' and '.join(map(str, sorted(layers)))} layers for {self.stage_layers}"

    @property
    def memory_bytes(self) -> int | None:
        """What torch allocates and reserves for a whole stage, and what lies outside of it."""
        memory = self.memory
        if memory is None or memory.peak is None:
            return None
        more = sum(item.bytes for item in memory.items if item.per_layer) * (self.stage_layers - memory.layers) / memory.layers
        return int((memory.peak + more) * (1 + memory.slack / memory.peak) + memory.outside)

    def item_bytes(self, item: MemoryItem) -> float:
        """Of a whole stage."""
        assert self.memory is not None
        return item.bytes * self.stage_layers / self.memory.layers if item.per_layer else item.bytes

    def _whole(self, seconds: dict[int, float]) -> float:
        """A line through the two largest numbers of layers, at all of them."""
        (most, slow), *rest = sorted(seconds.items(), reverse=True)
        if not rest or most == self.stage_layers:
            return slow * self.stage_layers / most
        fewer, fast = rest[0]
        return slow + (self.stage_layers - most) * (slow - fast) / (most - fewer)


def deciding(settings: Settings) -> dict[str, Any]:
    return {name: settings.value(name) for name in DECIDING}


def write(measured: Measured, path: Path) -> None:
    path.write_text(json.dumps({"format": FORMAT} | asdict(measured), indent=2) + "\n")


def read(path: Path) -> Measured:
    """ValueError says what is wrong with the file, in one line."""
    try:
        values = json.loads(path.read_text())
        if values.pop("format") != FORMAT:
            raise ValueError
        values["passes"] = [Pass(**item) for item in values["passes"]]
        values["kernels"] = [Kernel(**item) for item in values["kernels"]]
        if memory := values["memory"]:
            values["memory"] = MeasuredMemory(**memory | {"items": [MemoryItem(**item) for item in memory["items"]]})
        found = Measured(**values)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(
            f"{path}: is no file of scripts/measure.py (format {FORMAT}); make it with `scripts/measure.py`"
        ) from None
    if not found.passes:
        raise ValueError(f"{path}: the measurement was stopped before its first step: measure again")
    return found


def check(measured: Measured, settings: Settings, accelerator: str) -> Iterator[Finding]:
    """What the file cannot say of this config. An error: it is of another rank."""
    ours = deciding(settings)
    for name, value in measured.settings.items():
        if ours.get(name) != value:
            text = f"{name}={ours.get(name)}: the measured rank had {value}; measure this config"
            yield Finding("error", "measured", text)
    if accelerator and measured.accelerator != accelerator:
        text = f"measured on {measured.gpu}, the config names {accelerator}: times and memory are those of {measured.gpu}"
        yield Finding("warning", "measured", text)
    if not measured.finite:
        yield Finding("warning", "measured", NOT_FINITE)
    if measured.extrapolated:
        yield Finding("note", "measured", f"extrapolated: {measured.extrapolated}")
    if not measured.complete:
        yield Finding("warning", "measured", "the measurement was stopped: what it did not reach is forecast as without it")


def beside(measured: Measured, account: Memory) -> list[tuple[str, float | None, float]]:
    """(name, measured bytes, bytes of the account) of a whole stage; what cannot be measured alone has None."""
    sizes = {} if measured.memory is None else {i.name: measured.item_bytes(i) for i in measured.memory.items}
    found: list[tuple[str, float | None, float]] = []
    rest = list(account.items)
    for name, prefixes in Names.OF_ACCOUNT.items():
        ours = [item for item in rest if item.name.startswith(prefixes)]
        rest = [item for item in rest if item not in ours]
        if ours or sizes.get(name):
            found.append((name, sizes.get(name, 0.0), sum(item.bytes for item in ours)))
    return [*found, *((item.name, None, item.bytes) for item in rest)]


def memory_of(measured: Measured, account: Memory) -> Memory:
    """The measured rank, with what only a cluster has from the account; the account where memory was not measured."""
    total = measured.memory_bytes
    if total is None or measured.memory is None:
        return account
    items = [Item(item.name, measured.item_bytes(item), "measured") for item in measured.memory.items]
    rest = total - sum(item.bytes for item in items)
    cluster = [item for item in account.items if item.name == "userbuffers" or item.name.startswith("NCCL")]
    found = (*items, Item("working set, slack, context", rest, "measured"), *cluster)
    return Memory(found, total + sum(item.bytes for item in cluster), account.capacity)
