"""A forecast of step time, evaluation time and time to train, before the first GPU is booked.

A micro-batch of one sequence costs one replica of TP * CP GPUs

    matrix time   (linear FLOP / peak rate + attention FLOP / bf16 peak) / (TP * CP) / EFFICIENCY
  + memory time   bytes of norms, casts, dropout and SwiGLU / (TP * CP) / 80% of the memory bandwidth
  + TP time       TP_EXPOSED * bytes that all-gather and reduce-scatter move / link
  + CP time       CP_LAYER_SECONDS * layers where CP > 1: smaller kernels, waits on keys and values
                  (AMD: AMD_LAYER_SECONDS * layers * log2(TP * CP) for both: its submitters do not say how they split)

and a step takes MINIBS of them, times 1 + NEAR_STRAGGLERS per doubling of the GPUs in a scale-up domain + FAR_STRAGGLERS per
doubling of the domains. The peak rates, the FLOP and the bytes are counted; the capitals are fitted to published MLPerf v4.1
to v6.0 results by benchmarks/fit_timing.py, which leaves each system out in turn and prints the error on it. The efficiency
is that of a family of parts with a generation of software (generations.py). Attention gets no credit for FP8: the fit holds
runs with and without it.

Published FP4 runs trained in FP4 up to a step, went over to FP8 ("healing") and paused for it: two phases, forecast as such.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

from llama2_lora.config import rules
from llama2_lora.config.settings import Settings
from llama2_lora.forecast.generations import NEWEST
from llama2_lora.forecast.measured import Measured
from llama2_lora.gpus import Accelerator
from llama2_lora.llama2 import LLAMA2_70B, LlamaShape

NETWORK_GB_S = 50  # one 400 Gb/s port a GPU, where a group leaves the fast links
MEMORY_EFFICIENCY = 0.8
BACKWARD = 1.0  # of a frozen linear layer: only the gradient of its input
ATTENTION_BACKWARD = 2.5  # five products instead of two: the scores are computed again
# Healing: GBS 8 from step 350, GBS 16 from step 170 (configs of v5.1 and v6.0)
HEAL_SEQUENCES = 2800
HEAL_SECONDS = 22.0  # 8xGB200, v5.1: steps 340 to 350 took 32.5 s in place of 10.3
HEALED_SLOWDOWN = 1.2  # of FP8 after FP4 against FP8 alone: 1.0 (B200), 1.1 (GB300) and 1.7 (GB200 with CP2)
# Of [S, h] forward and backward, a layer: two all-gathers and two reduce-scatters, and the same again
TP_COLLECTIVES = 8
# Of those, what published code cannot overlap for its adapter's sake, and this project's can (docs/forecast.md)
ADAPTER_COLLECTIVES = 1
MANY_GPUS = 512  # over a network: two entries with one part and one layout differ by 26% (v4.1 Azure, v5.0 Oracle)


@dataclass(frozen=True)
class Constants:
    efficiency: dict[str, float]  # "family", "family generation", either with " fp4"
    tp_exposed: float
    cp_layer_seconds: float
    amd_layer_seconds: float
    near_stragglers: float
    far_stragglers: float
    eval_share: float  # of a forward pass in a training micro-batch
    eval_fixed_seconds: float
    eval_least_seconds: dict[str, float]  # of a forward pass: what the host takes to launch it, by family; "": any other


# Made by: python benchmarks/fit_timing.py
FITTED = Constants(
    efficiency={
        "Hopper": 0.549,
        "H200-NVL": 0.587,
        "GH200": 0.443,
        "Blackwell v4.1": 0.466,
        "Blackwell v5.0": 0.499,
        "Blackwell v5.1": 0.618,
        "Blackwell fp4": 0.474,
        "B300": 0.627,
        "GB300": 0.810,
        "GB300 fp4": 0.523,
        "MI300X v5.0": 0.289,
        "MI300X v5.1": 0.299,
        "MI325X v5.0": 0.397,
        "MI325X v5.1": 0.404,
        "MI355X": 0.460,
        "MI355X fp4": 0.377,
    },
    tp_exposed=0.958,
    cp_layer_seconds=4.64e-4,
    amd_layer_seconds=3.02e-3,
    near_stragglers=0.0282,
    far_stragglers=0.0377,
    eval_share=0.867,
    eval_fixed_seconds=0.397,
    eval_least_seconds={"Hopper": 0.431, "": 0.05},
)
# Of log(forecast / published), so that nine of ten left-out systems lie within 1.645 times it: Hopper 47 entries, Blackwell 35,
# MI300X 10, MI325X 8, FP4 3. The others have one or two submitters, so what they say of a third is a guess: 10% and more.
HELD_OUT_ERROR = {
    "Hopper": 0.06,
    "Blackwell": 0.05,
    "MI300X": 0.05,
    "MI325X": 0.05,
    "fp4": 0.08,
    "B300": 0.06,
    "MI355X": 0.06,
    "MI350X": 0.10,  # by MI355X's efficiency: no entry of its own
    "GB300": 0.10,
    "GH200": 0.15,
    "H200-NVL": 0.10,
}
EVAL_ERROR = 0.10  # nine of ten of 106 left-out evaluations within 15%
UNSEEN_ERROR = 0.25  # a guess: bf16, pipelining, recomputation, offloading, other parts: no published run to fit
UNSEEN_EFFICIENCY = 0.4
UNSEEN_FP4_SHARE = 0.7  # of the efficiency in FP8: 0.77 on Blackwell, 0.66 on GB300
MEASURED_ERROR = 0.10  # a guess: no run on a cluster has been compared with its measured rank
NORMAL_90 = 1.645


@dataclass(frozen=True)
class Work:
    """What decides the time of a step."""

    accelerator: Accelerator
    gpus: int
    minibs: int
    tp: int = 1
    pp: int = 1
    cp: int = 1
    precision: str = "fp8"  # of the linear layers: bf16, fp8 or fp4
    recompute: bool = False
    offload: bool = False
    sequence_length: int = rules.SEQUENCE_LENGTH
    generation: str = NEWEST  # of the software
    evaluation_cp: int | None = None  # CP of an evaluation where it is another one (VAL_CP)
    heal_sequences: float = HEAL_SEQUENCES  # after which a run in FP4 goes over to FP8
    shape: LlamaShape = field(default=LLAMA2_70B, repr=False)

    @classmethod
    def from_settings(cls, settings: Settings, accelerator: Accelerator, generation: str = NEWEST) -> Work:
        s, p = settings.system, settings.precision
        return cls(
            accelerator=accelerator,
            gpus=s.nodes * s.gpus_per_node,
            minibs=settings.batch.minibs,
            tp=settings.parallel.tp,
            pp=settings.parallel.pp,
            cp=settings.parallel.cp,
            precision="fp4" if p.fp4 else "fp8" if p.fp8 else "bf16",
            recompute=settings.performance.recompute == "full",
            offload=settings.performance.offload_layers > 0,
            sequence_length=settings.batch.sequence_length,
            generation=generation,
            evaluation_cp=settings.parallel.validation_cp,
            heal_sequences=math.inf if p.fp4_heal_step is None else p.fp4_heal_step * settings.global_batch_size,
        )

    @property
    def replicas(self) -> int:
        return self.gpus // (self.tp * self.pp * self.cp)

    @property
    def evaluating(self) -> Work:
        """The same in the evaluation's layout."""
        return replace(self, cp=self.evaluation_cp or self.cp)

    @property
    def gbs(self) -> int:
        return self.minibs * self.replicas

    @property
    def heals(self) -> bool:
        return self.precision == "fp4" and self.heal_sequences < math.inf

    @property
    def kind(self) -> str:
        """Key of the efficiency: the most particular one that the fit has."""
        part, end = self.accelerator.family, " fp4" if self.precision == "fp4" else ""
        names = (f"{part} {self.generation}{end}", f"{part}{end}")
        return next((name for name in names if name in FITTED.efficiency), names[-1])

    @property
    def not_covered(self) -> str:
        """Why no published result of this kind was there to fit; empty where there was."""
        if self.precision == "bf16" or self.pp > 1 or self.recompute or self.offload:
            return "no published run used bf16, pipelining, full recomputation or offloading"
        if self.kind not in FITTED.efficiency:
            return f"no published run of {self.accelerator.name} in {self.precision.upper()}"
        if self.gpus >= MANY_GPUS and self.accelerator.domain < MANY_GPUS // 8:
            return f"{MANY_GPUS} GPUs or more over a network: published ones differ by 26% with one part and one layout"
        if self.amd and self.gpus > 4 * self.accelerator.domain:
            return "no published run on more than four nodes of AMD's"
        return ""

    @property
    def seen(self) -> bool:
        return not self.not_covered

    @property
    def amd(self) -> bool:
        return self.accelerator.name.startswith("MI")


@dataclass(frozen=True)
class Interval:
    """A value and the bounds that 9 of 10 published systems would lie between."""

    low: float
    middle: float
    high: float

    @classmethod
    def around(cls, middle: float, error: float) -> Interval:
        factor = math.exp(NORMAL_90 * error)
        return cls(middle / factor, middle, middle * factor)


def forward_flop(shape: LlamaShape, sequence_length: int) -> tuple[float, float]:
    """FLOP of one sequence forward: in linear layers (with the output layer), in causal attention."""
    in_layers = shape.layers * shape.hidden * (shape.qkv_rows + shape.hidden + 3 * shape.ffn)
    linear = 2.0 * sequence_length * (in_layers + shape.vocab * shape.hidden)
    return linear, 2.0 * sequence_length**2 * shape.hidden * shape.layers


def step_seconds(work: Work, constants: Constants = FITTED) -> float:
    """One optimizer step, in the precision of `work`: before healing, where that is FP4."""
    micro_batch = _micro_batch_seconds(work, constants)
    bubble = (work.pp - 1) / work.pp * micro_batch  # 1F1B: pp - 1 micro-batches of a stage's share
    return (work.minibs * micro_batch / work.pp + bubble) * _straggling(work, constants)


def step_seconds_with_our_adapter(work: Work) -> float:
    """An estimate, since the published runs that were fitted moved more for their adapter, under sequence parallelism.

    NeMo's linear_qkv hands its gathered input to the adapter, so nothing overlaps that gather; training/low_rank.py gathers
    [S, r]. The saving is this gather's part of the TP time; what either moves beyond it, below 2% of it, is left out.
    """
    kept = 1 - ADAPTER_COLLECTIVES / TP_COLLECTIVES
    return step_seconds(work, replace(FITTED, tp_exposed=kept * FITTED.tp_exposed))


def healed(work: Work) -> Work:
    """The second phase of a run in FP4; the same work in any other precision."""
    return replace(work, precision="fp8") if work.precision == "fp4" else work


def training_seconds(work: Work, sequences: float, constants: Constants = FITTED) -> float:
    """All steps of a run of `sequences`, evaluation left out."""
    return _both_phases(work, sequences, step_seconds(work, constants), HEALED_SLOWDOWN * step_seconds(healed(work), constants))


def _both_phases(work: Work, sequences: float, step: float, healed_step: float) -> float:
    """Seconds of all steps: a run in FP4 that goes over to FP8 pauses for it."""
    steps = sequences / work.gbs
    before = work.heal_sequences / work.gbs
    if not work.heals or before >= steps:
        return steps * step
    return before * step + HEAL_SECONDS + (steps - before) * healed_step


def eval_seconds(work: Work, constants: Constants = FITTED) -> float:
    """One evaluation of all 173 sequences, forward only."""
    work = work.evaluating
    linear, attention = forward_flop(work.shape, work.sequence_length)
    trained = linear * (1 + BACKWARD) + attention * (1 + ATTENTION_BACKWARD)
    forward = _micro_batch_seconds(replace(work, recompute=False), constants) * (linear + attention) / trained
    rounds = math.ceil(rules.EVAL_SEQUENCES / work.replicas)
    least = constants.eval_least_seconds
    seconds = max(constants.eval_share * forward * _straggling(work, constants), least.get(work.accelerator.family, least[""]))
    return rounds * seconds + constants.eval_fixed_seconds


def error_of(work: Work) -> float:
    if not work.seen:
        return UNSEEN_ERROR
    part = work.accelerator
    names = ("fp4",) if work.precision == "fp4" else (part.name, part.family)
    return next((HELD_OUT_ERROR[name] for name in names if name in HELD_OUT_ERROR), UNSEEN_ERROR)


def forecast(work: Work, sequences: float, evaluations: float, spread: float = 0.0) -> dict[str, Interval]:
    """Seconds of a step (the mean over the run) and of an evaluation, minutes from run_start to run_stop.

    spread: standard deviation of the sequences that a run takes, as a share of them.
    """
    error = error_of(work)
    training, evaluation = training_seconds(work, sequences), eval_seconds(work)
    minutes = (training + evaluations * evaluation) / 60
    found = {
        "step_seconds": Interval.around(training * work.gbs / sequences, error),
        "eval_seconds": Interval.around(evaluation, max(error, EVAL_ERROR)),
        "run_minutes": Interval.around(minutes, math.hypot(error, spread)),
    }
    if work.heals:
        found["fp4_step_seconds"] = Interval.around(step_seconds(work), error)
        found["healed_step_seconds"] = Interval.around(HEALED_SLOWDOWN * step_seconds(healed(work)), UNSEEN_ERROR)
    return found


def forecast_of_rank(work: Work, sequences: float, evaluations: float, spread: float, rank: Measured) -> dict[str, Interval]:
    """The same, of a rank that was measured alone; in FP4 it was before healing, so a healed step is as much slower as of
    the fit."""
    step, evaluation = with_neighbours(work, rank.step_seconds, rank.eval_seconds)
    healed_step = step * HEALED_SLOWDOWN * step_seconds(healed(work)) / step_seconds(work)
    training = _both_phases(work, sequences, step, healed_step)
    found = {
        "step_seconds": Interval.around(training * work.gbs / sequences, MEASURED_ERROR),
        "eval_seconds": Interval.around(evaluation, EVAL_ERROR if rank.eval_seconds is None else MEASURED_ERROR),
        "run_minutes": Interval.around((training + evaluations * evaluation) / 60, math.hypot(MEASURED_ERROR, spread)),
    }
    if work.heals:
        found["fp4_step_seconds"] = Interval.around(step, MEASURED_ERROR)
        found["healed_step_seconds"] = Interval.around(healed_step, UNSEEN_ERROR)
    return found


def with_neighbours(work: Work, step: float, evaluation: float | None) -> tuple[float, float]:
    """Seconds of a step and of an evaluation on all GPUs, where one rank alone takes `step` and `evaluation` (measured.py).

    CP_LAYER_SECONDS counts in full, although a part of it, the smaller kernels, is in the measured time too.
    """
    exposed, slower = _communication_seconds(work, FITTED) / work.pp, _straggling(work, FITTED)
    bubble = 1 + (work.pp - 1) / work.minibs  # 1F1B: a stage waits for pp - 1 micro-batches
    whole = (step + work.minibs * exposed) * bubble * slower
    if evaluation is None:
        return whole, eval_seconds(work)
    alone = work.evaluating
    rounds, exposed = math.ceil(rules.EVAL_SEQUENCES / alone.replicas), _communication_seconds(alone, FITTED) / work.pp
    return whole, (evaluation + rounds * exposed / 2) * slower  # half of the collectives are the backward's


def _micro_batch_seconds(work: Work, constants: Constants) -> float:
    """Forward and backward of one sequence on the GPUs of one replica, as if PP were 1."""
    part, shape, share = work.accelerator, work.shape, work.tp * work.cp
    linear, attention = forward_flop(shape, work.sequence_length)
    passes = 2.0 if work.recompute else 1.0
    rate = {"bf16": part.bf16_tflops, "fp8": part.fp8_tflops, "fp4": part.fp4_tflops or part.fp8_tflops}[work.precision]
    matrix = (linear * (passes + BACKWARD) / rate + attention * (passes + ATTENTION_BACKWARD) / part.bf16_tflops) / 1e12
    # About 50 h + 10 f values of two bytes a token and layer, read or written, forward and backward.
    moved = work.sequence_length * shape.layers * (100 * shape.hidden + 20 * shape.ffn)
    seconds = matrix / share / _efficiency(work, constants)
    seconds += moved / share / (part.memory_tb_s * 1e12 * MEMORY_EFFICIENCY)
    return seconds + _communication_seconds(work, constants)


def _efficiency(work: Work, constants: Constants) -> float:
    """Of the fit; bf16 is taken for FP8's, FP4 where no published run used it for a share of FP8's."""
    family = work.accelerator.family
    end = " fp4" if work.precision == "fp4" else ""
    for name in (f"{family} {work.generation}{end}", f"{family}{end}"):
        if name in constants.efficiency:
            return constants.efficiency[name]
    return _efficiency(healed(work), constants) * UNSEEN_FP4_SHARE if end else UNSEEN_EFFICIENCY


def _communication_seconds(work: Work, constants: Constants) -> float:
    shape, tp = work.shape, work.tp
    if work.amd:
        return constants.amd_layer_seconds * shape.layers * math.log2(tp * work.cp)
    fast = tp <= work.accelerator.domain
    link = (work.accelerator.link_gb_s if fast else NETWORK_GB_S) * 1e9
    moved = TP_COLLECTIVES * (tp - 1) / tp * work.sequence_length / work.cp * shape.hidden * 2 * shape.layers
    return constants.tp_exposed * moved / link + constants.cp_layer_seconds * shape.layers * (work.cp > 1)


def _straggling(work: Work, constants: Constants) -> float:
    if work.amd:
        return 1.0  # in its time a layer
    domain = work.accelerator.domain
    near, far = math.log2(min(work.gpus, domain)), math.log2(max(1.0, work.gpus / domain))
    return 1 + constants.near_stragglers * near + constants.far_stragglers * far
