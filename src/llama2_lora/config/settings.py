"""The only reader of the environment: shell variables -> one frozen `Settings` value.

Each field is one line: default, variable, unit or choices, what it does. `Settings.from_env()` parses and checks all of
them and reports every problem at once. `PYTHONPATH=src python -m llama2_lora.config.settings` prints the README's table.
"""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from llama2_lora.config import rules, schedule

T = TypeVar("T")
INT32 = 2**31 - 1


class SettingsError(ValueError):
    """Every problem of an environment, one per line: variable, value, rule, fix."""


def _boolean(text: str) -> bool:
    known = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}
    try:
        return known[text.strip().lower()]
    except KeyError:
        raise ValueError("must be 0 or 1") from None


def _integer(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError("must be an integer") from None


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError("must be a finite number")
    return value


def walltime_minutes(text: str) -> float:
    """Minutes in one of Slurm's time formats: M, M:S, H:M:S, D-H, D-H:M or D-H:M:S (sbatch(1), --time)."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text.strip())
    if not match:
        raise ValueError("must be a Slurm time such as 45, 45:00, 1:30:00 or 1-12:00")
    days, *parts = (int(group) if group is not None else None for group in match.groups())
    a, b, c = (part or 0 for part in parts)
    if days is not None:
        return days * 1440 + a * 60 + b + c / 60
    return a * 60 + b + c / 60 if parts[2] is not None else a + b / 60


def _setting(
    variable: str,
    default: Any = MISSING,
    doc: str = "",
    *,
    parse: Callable[[str], Any] = str,
    unit: str = "",
    choices: tuple[str, ...] = (),
    low: float | None = None,
    high: float | None = None,
) -> Any:
    metadata = dict(variable=variable, doc=doc, parse=parse, unit=unit, choices=choices, low=low, high=high)
    return field(default=default, metadata=metadata) if default is not MISSING else field(metadata=metadata)


# fmt: off
@dataclass(frozen=True, kw_only=True)
class System:
    """The machine and the job."""
    platform: str = _setting("PLATFORM", "gpu", "Where the model runs; `cpu` is for rehearsals", choices=("gpu", "cpu"))
    name: str = _setting("DGXSYSTEM", doc="System and shape, as in the config's file name: `NAME_NODESxGPUSxMINIBS`")
    nodes: int = _setting("DGXNNODES", doc="Nodes of the job", parse=_integer, low=1)
    gpus_per_node: int = _setting("DGXNGPU", doc="GPUs (ranks) per node", parse=_integer, low=1)
    accelerator: str = _setting("ACCELERATOR", "", "GPU model that memory and time are forecast for", choices=("", "H100", "H200", "B200", "B300", "GB200", "GB300", "MI300X", "MI325X", "MI355X", "CPU"))
    walltime: str = _setting("WALLTIME", "60", "Time limit of the whole job, for `sbatch -t`", unit="Slurm time")
    trials: int = _setting("NEXP", rules.RUNS_PER_RESULT, "Training runs in one job", parse=_integer, low=1)
    world_size: int | None = _setting("WORLD_SIZE", None, "Ranks, from the launcher", parse=_integer, low=1)
    rank: int = _setting("RANK", 0, "This process's rank, from the launcher", parse=_integer, low=0)
    local_rank: int = _setting("LOCAL_RANK", 0, "This process's rank on its node, from the launcher", parse=_integer, low=0)


@dataclass(frozen=True, kw_only=True)
class Submission:
    """What the log says of the submitter."""
    division: str = _setting("MLPERF_DIVISION", "closed", "Rules that apply", choices=("closed", "open"))
    organization: str = _setting("MLPERF_SUBMITTER", "unofficial", "Submitting organization")
    status: str = _setting("MLPERF_STATUS", "research", "Availability of the system", choices=("onprem", "cloud", "preview", "research"))
    platform: str = _setting("MLPERF_SYSTEM_NAME", "", "Name of the system; default: DGXSYSTEM")


@dataclass(frozen=True, kw_only=True)
class Parallel:
    """How one model replica is laid out."""
    tp: int = _setting("TP", 1, "Tensor parallel size", parse=_integer, low=1)
    pp: int = _setting("PP", 1, "Pipeline parallel size", parse=_integer, low=1)
    cp: int = _setting("CP", 1, "Context parallel size", parse=_integer, low=1)
    sequence_parallel: bool = _setting("SP", False, "Sequence parallelism over the TP group", parse=_boolean)

    @property
    def model_parallel_size(self) -> int:
        return self.tp * self.pp * self.cp


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Sequences per step. GBS = MINIBS * DP."""
    minibs: int = _setting("MINIBS", doc="Sequences that one model replica takes per optimizer step", parse=_integer, low=1, unit="sequences")
    micro: int = _setting("MBS", 1, "Micro batch size; gradient accumulation is MINIBS / MBS", parse=_integer, low=1, unit="sequences")
    validation_micro: int = _setting("VAL_MBS", 1, "Micro batch size of the evaluation", parse=_integer, low=1, unit="sequences")
    sequence_length: int = _setting("MAX_SEQLEN", rules.SEQUENCE_LENGTH, "Tokens per sequence", parse=_integer, low=2, unit="tokens")
    mask_alignment: str = _setting("LOSS_MASK_ALIGN", "nvidia", "Which target a loss-mask entry belongs to: `nvidia` pairs mask[t] with token t+1, `reference` pairs mask[t+1] with it", choices=("nvidia", "reference"))

    @property
    def gradient_accumulation_steps(self) -> int:
        return self.minibs // self.micro


@dataclass(frozen=True, kw_only=True)
class Optimization:
    """AdamW, cosine to 0, and the adapter."""
    lr: float = _setting("LR", doc="Base learning rate", parse=_number, low=0)
    max_steps: int = _setting("MAX_STEPS", doc="Optimizer steps at which the cosine ends and the run gives up", parse=_integer, low=1, unit="steps")
    warmup_ratio: float = _setting("LR_WARMUP_RATIO", 0.0, "Share of MAX_STEPS with a linearly rising LR", parse=_number, low=0, high=1)
    clip_norm: float = _setting("GRADIENT_CLIP_NORM", rules.GRADIENT_CLIP_NORM, "Global gradient norm limit", parse=_number, low=0)
    weight_decay: float = _setting("WEIGHT_DECAY", rules.WEIGHT_DECAY, "AdamW weight decay", parse=_number, low=0)
    lora_rank: int = _setting("LORA_RANK", rules.LORA_RANK, "LoRA rank", parse=_integer, low=1)
    lora_alpha: int = _setting("LORA_ALPHA", rules.LORA_ALPHA, "LoRA alpha; the adapter is scaled by alpha / rank", parse=_integer, low=1)
    lora_dropout: float = _setting("LORA_DROPOUT", rules.LORA_DROPOUT, "Dropout on the adapter's input", parse=_number, low=0, high=1)

    @property
    def warmup_steps(self) -> int:
        return math.ceil(self.warmup_ratio * self.max_steps)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """When to evaluate and when to stop."""
    target_loss: float = _setting("TARGET_LOSS", rules.TARGET_LOSS, "Evaluation loss that ends the run", parse=_number, low=0, unit="nats")
    every_sequences: int = _setting("EVAL_EVERY_SEQUENCES", rules.EVAL_EVERY_SEQUENCES, "Evaluation cadence, rounded up to whole steps", parse=_integer, low=1, unit="sequences")
    skip: int | None = _setting("EVAL_SKIP", None, "Evaluations left out at the start; default: the rule's floor(0.125 * GBS + 2)", parse=_integer, low=0)

    def reached(self, loss: float) -> bool:
        """Whether an evaluation loss ends the run: at the target or below (rules §9.4)."""
        return loss <= self.target_loss


@dataclass(frozen=True, kw_only=True)
class Precision:
    """bf16 (fp32 on the CPU) with FP8 or FP4 matrix products."""
    fp8: bool = _setting("FP8", False, "FP8 linear layers", parse=_boolean)
    fp8_recipe: str = _setting("FP8_RECIPE", "delayed", "FP8 scaling", choices=("delayed", "tensorwise", "mxfp8", "blockwise"))
    fp8_format: str = _setting("FP8_FORMAT", "hybrid", "E4M3 everywhere, or `hybrid`: E5M2 for gradients", choices=("hybrid", "e4m3"))
    fp8_amax_algo: str = _setting("FP8_AMAX_ALGO", "most_recent", "How delayed scaling reads the amax history", choices=("most_recent", "max"))
    fp8_amax_history: int = _setting("FP8_AMAX_HISTORY", 4, "Length of the amax history of delayed scaling", parse=_integer, low=1, unit="steps")
    fp8_attention: bool = _setting("FP8_DPA", False, "FP8 dot product attention", parse=_boolean)
    fp8_weights: bool = _setting("FP8_PARAMS", False, "Keep the frozen weights in FP8 only: halves their memory", parse=_boolean)
    fp8_swiglu: bool = _setting("FP8_ACT", False, "Keep SwiGLU's input for the backward pass in FP8: halves the largest activation", parse=_boolean)
    fp4: bool = _setting("FP4", False, "NVFP4 linear layers (Blackwell)", parse=_boolean)


@dataclass(frozen=True, kw_only=True)
class Performance:
    """What changes speed and memory, not the result."""
    tp_comm_overlap: bool = _setting("TP_COMM_OVERLAP", False, "Overlap tensor-parallel communication with GEMMs through userbuffers; needs SP", parse=_boolean)
    recompute: str = _setting("RECOMPUTE", "none", "Activation recomputation", choices=("none", "selective", "full"))
    offload_layers: int = _setting("CPU_OFFLOAD_LAYERS", 0, "Layers whose activations are offloaded to host memory", parse=_integer, low=0, unit="layers")
    warmup_train_steps: int = _setting("WARMUP_TRAIN_STEPS", 0, "Synthetic training steps before the clock starts", parse=_integer, low=0, unit="steps")
    warmup_validation_steps: int = _setting("WARMUP_VALIDATION_STEPS", 0, "Synthetic evaluation batches before the clock starts", parse=_integer, low=0, unit="batches")
    log_every_steps: int = _setting("LOG_EVERY_STEPS", 10, "Cadence of the logged train loss", parse=_integer, low=1, unit="steps")


@dataclass(frozen=True, kw_only=True)
class Run:
    """Files and seed of one run. The paths are those inside the container."""
    data_path: str = _setting("DATA_PATH", "/data", "Folder of train.npy and validation.npy")
    checkpoint_path: str = _setting("CKPT_PATH", "/ckpt", "Folder of the NeMo checkpoint: context/ and weights/")
    results_path: str = _setting("RESULTS_PATH", "/results", "Folder that the run writes to")
    save_adapter: bool = _setting("SAVE_ADAPTER", False, "Write the adapter to RESULTS_PATH/adapter_SEED after run_stop", parse=_boolean)
    seed: int | None = _setting("SEED", None, "Seed; default: from /dev/urandom, the same on every rank", parse=_integer, low=0, high=INT32)
# fmt: on


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One run, resolved. Read-only; handed down as an argument."""

    system: System
    submission: Submission
    parallel: Parallel
    batch: Batch
    optimization: Optimization
    evaluation: Evaluation
    precision: Precision
    performance: Performance
    run: Run

    @classmethod
    def from_env(cls, env: Mapping[str, str] | None = None) -> Settings:
        """Parse and check. Raises SettingsError with every problem, one per line."""
        env = os.environ if env is None else env  # the one place that reads it
        problems: list[str] = []
        groups: dict[str, Any] = {name: _parse_group(group, env, problems) for name, group in GROUPS.items()}
        if not problems:
            settings = cls(**groups)
            problems = list(_contradictions(settings))
        if problems:
            raise SettingsError("\n".join(problems))
        return settings

    @property
    def data_parallel_size(self) -> int:
        s, p = self.system, self.parallel
        return schedule.data_parallel_size(s.nodes, s.gpus_per_node, p.tp, p.pp, p.cp)

    @property
    def global_batch_size(self) -> int:
        return self.batch.minibs * self.data_parallel_size

    @property
    def weights_dtype(self) -> str:
        """What training holds the base weights in, by safetensors' names; a checkpoint must have the same."""
        return "F32" if self.system.platform == "cpu" else "BF16"

    @property
    def eval_every_steps(self) -> int:
        return schedule.eval_every_steps(self.global_batch_size, self.evaluation.every_sequences)

    @property
    def eval_steps(self) -> range:
        e = self.evaluation
        return schedule.eval_steps(self.global_batch_size, self.optimization.max_steps, e.every_sequences, e.skip)


GROUPS: dict[str, type] = {
    "system": System,
    "submission": Submission,
    "parallel": Parallel,
    "batch": Batch,
    "optimization": Optimization,
    "evaluation": Evaluation,
    "precision": Precision,
    "performance": Performance,
    "run": Run,
}

# Fixed by the rules: free only on the CPU (a rehearsal proves nothing to MLPerf) and in the open division.
FIXED_IN_CLOSED = {
    "MAX_SEQLEN": rules.SEQUENCE_LENGTH,
    "GRADIENT_CLIP_NORM": rules.GRADIENT_CLIP_NORM,
    "WEIGHT_DECAY": rules.WEIGHT_DECAY,
    "LORA_RANK": rules.LORA_RANK,
    "LORA_ALPHA": rules.LORA_ALPHA,
    "LORA_DROPOUT": rules.LORA_DROPOUT,
    "TARGET_LOSS": rules.TARGET_LOSS,
    "EVAL_EVERY_SEQUENCES": rules.EVAL_EVERY_SEQUENCES,
    "EVAL_SKIP": None,
}


def _parse_group(group: type[T], env: Mapping[str, str], problems: list[str]) -> T | None:
    values = {}
    for f in fields(group):  # type: ignore[arg-type]
        meta, text = f.metadata, env.get(f.metadata["variable"], "")
        if text == "" and f.default is MISSING:
            problems.append(f"{meta['variable']}: is not set: {meta['doc']}; source a config_*.sh")
        elif text != "":  # an empty variable means unset, as in most shell scripts
            try:
                values[f.name] = _parse_value(f, text)
            except ValueError as error:
                problems.append(f"{meta['variable']}={text}: {error}")
    return None if problems else group(**values)


def _parse_value(f: Field[Any], text: str) -> Any:
    meta = f.metadata
    value = meta["parse"](text)
    if meta["choices"] and value not in meta["choices"]:
        raise ValueError(f"must be one of {', '.join(c for c in meta['choices'] if c)}")
    if meta["low"] is not None and value < meta["low"]:
        raise ValueError(f"must be at least {meta['low']}")
    if meta["high"] is not None and value > meta["high"]:
        raise ValueError(f"must be at most {meta['high']}")
    return value


def all_fields() -> Iterator[tuple[str, Field[Any]]]:
    """(group name, field) of every setting, in reading order."""
    for name, group in GROUPS.items():
        for f in fields(group):
            yield name, f


def variables() -> frozenset[str]:
    """Names of all environment variables that this module reads."""
    return frozenset(f.metadata["variable"] for _, f in all_fields())


def value_of(settings: Settings, variable: str) -> Any:
    """The resolved value of an environment variable's field."""
    for group, f in all_fields():
        if f.metadata["variable"] == variable:
            return getattr(getattr(settings, group), f.name)
    raise KeyError(variable)


def _contradictions(s: Settings) -> Iterator[str]:
    yield from _layout_problems(s)
    yield from _batch_problems(s)
    yield from _precision_problems(s)
    yield from _rule_problems(s)


def _layout_problems(s: Settings) -> Iterator[str]:
    p, system = s.parallel, s.system
    world = system.nodes * system.gpus_per_node
    if world % p.model_parallel_size:
        yield (
            f"TP*PP*CP={p.tp}*{p.pp}*{p.cp}={p.model_parallel_size}: must divide DGXNNODES*DGXNGPU="
            f"{system.nodes}*{system.gpus_per_node}={world}; change one of the five"
        )
    if p.tp > system.gpus_per_node:
        yield f"TP={p.tp}: must not exceed DGXNGPU={system.gpus_per_node}: tensor parallelism needs NVLink; use PP or CP across nodes"
    elif system.gpus_per_node % p.tp:
        yield f"TP={p.tp}: must divide DGXNGPU={system.gpus_per_node}, or a tensor-parallel group straddles two nodes"
    if p.sequence_parallel and p.tp == 1:
        yield "SP=1: needs TP > 1: it shards the sequence over the TP group; set SP=0"
    if s.performance.tp_comm_overlap and not p.sequence_parallel:
        yield "TP_COMM_OVERLAP=1: needs SP=1 (and TP > 1): userbuffers overlap the sequence-parallel collectives"
    if system.world_size is not None and system.world_size != world:
        yield f"WORLD_SIZE={system.world_size}: must equal DGXNNODES*DGXNGPU={system.nodes}*{system.gpus_per_node}={world}; launch that many ranks"
    if system.world_size is not None and system.rank >= system.world_size:
        yield f"RANK={system.rank}: must be below WORLD_SIZE={system.world_size}"
    try:
        walltime_minutes(system.walltime)
    except ValueError as error:
        yield f"WALLTIME={system.walltime}: {error}"
    shape = f"{system.nodes}x{system.gpus_per_node}x{s.batch.minibs}"
    if system.name.rsplit("_", 1)[-1] != shape:
        yield f"DGXSYSTEM={system.name}: must end in _{shape}, that is DGXNNODES x DGXNGPU x MINIBS; rename it and the config"


def _batch_problems(s: Settings) -> Iterator[str]:
    b, p = s.batch, s.parallel
    if b.minibs % b.micro:
        yield f"MBS={b.micro}: must divide MINIBS={b.minibs}"
    if p.cp > 1 and b.sequence_length % (2 * p.cp):
        yield f"MAX_SEQLEN={b.sequence_length}: must be divisible by 2*CP={2 * p.cp}: each rank takes two chunks"
    if p.sequence_parallel and b.sequence_length % (p.tp * p.cp):
        yield f"MAX_SEQLEN={b.sequence_length}: must be divisible by TP*CP={p.tp * p.cp} with SP=1"
    if s.performance.offload_layers and p.pp > 1:
        yield f"CPU_OFFLOAD_LAYERS={s.performance.offload_layers}: needs PP=1: Megatron offloads without pipelining only"
    if s.performance.offload_layers and s.performance.recompute != "none":
        yield f"CPU_OFFLOAD_LAYERS={s.performance.offload_layers}: needs RECOMPUTE=none: what is recomputed is not offloaded"


def _precision_problems(s: Settings) -> Iterator[str]:
    p = s.precision
    if p.fp8 and p.fp4:
        yield "FP4=1: contradicts FP8=1: a linear layer has one precision; set one of them to 0"
    for variable, value in (("FP8_DPA", p.fp8_attention), ("FP8_PARAMS", p.fp8_weights), ("FP8_ACT", p.fp8_swiglu)):
        if value and not p.fp8:
            yield f"{variable}=1: needs FP8=1"
    if p.fp8_attention and p.fp8_recipe != "delayed":
        yield f"FP8_DPA=1: needs FP8_RECIPE=delayed, not {p.fp8_recipe}: Transformer Engine 2.9 scales attention so"
    if s.performance.tp_comm_overlap and s.batch.validation_micro != s.batch.micro:
        yield f"VAL_MBS={s.batch.validation_micro}: must equal MBS={s.batch.micro} with TP_COMM_OVERLAP=1: userbuffers have one size"


def _rule_problems(s: Settings) -> Iterator[str]:
    if s.submission.division != "closed" or s.system.platform == "cpu":
        return
    for variable, fixed in FIXED_IN_CLOSED.items():
        if (value := value_of(s, variable)) != fixed:
            fix = f"set it to {fixed}" if fixed is not None else "unset it"
            yield f"{variable}={value}: is fixed by the closed division; {fix} or MLPERF_DIVISION=open"


def check_paths(settings: Settings) -> None:
    """Raise SettingsError where a run's files are missing or its results cannot be written. Opens nothing."""
    run, problems = settings.run, []
    for name in ("train.npy", "validation.npy"):
        if not (path := Path(run.data_path, name)).is_file():
            problems.append(f"DATA_PATH={run.data_path}: {path} does not exist; run scripts/download_dataset.py")
    if not Path(run.checkpoint_path).is_dir():
        problems.append(f"CKPT_PATH={run.checkpoint_path}: is not a folder; run scripts/convert_model.py or download_model.py")
    if not os.access(run.results_path, os.W_OK | os.X_OK):
        problems.append(f"RESULTS_PATH={run.results_path}: is not a folder that this user can write to")
    if problems:
        raise SettingsError("\n".join(problems))


def markdown_table() -> str:
    """The README's table of settings."""
    rows = ["| variable | default | values | meaning |", "| --- | --- | --- | --- |"]
    for _, f in all_fields():
        meta = f.metadata
        default = "required" if f.default is MISSING else "" if f.default in (None, "") else f"`{_plain(f.default)}`"
        values = " ".join(f"`{c}`" for c in meta["choices"] if c) or ("`0` `1`" if meta["parse"] is _boolean else meta["unit"])
        rows.append(f"| `{meta['variable']}` | {default} | {values} | {meta['doc']} |")
    return "\n".join(rows)


def _plain(value: Any) -> Any:
    return int(value) if isinstance(value, bool) else value


if __name__ == "__main__":
    sys.stdout.write(markdown_table() + "\n")
