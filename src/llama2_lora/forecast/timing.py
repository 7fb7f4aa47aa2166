"""A forecast of step time, evaluation time and time to train, before the first GPU is booked.

A micro-batch of one sequence costs one replica of TP * CP GPUs

    matrix time   (linear FLOP / peak rate + attention FLOP / bf16 peak) / (TP * CP) / EFFICIENCY of the GPU family
  + memory time   bytes of norms, casts, dropout and SwiGLU / (TP * CP) / 80% of the memory bandwidth
  + TP time       TP_EXPOSED * bytes that all-gather and reduce-scatter move / link
  + CP time       CP_LAYER_SECONDS * layers where CP > 1: smaller kernels, waits on keys and values

and a step takes MINIBS of them, times 1 + STRAGGLERS * log2(GPUs). The peak rates, the FLOP and the bytes are counted;
the capitals are fitted to published MLPerf v4.1 and v5.0 results by benchmarks/fit_timing.py, which prints the error on
results that the fit did not see. Attention gets no credit for FP8: the fit holds runs with and without it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

from llama2_lora.config import rules
from llama2_lora.config.settings import Settings
from llama2_lora.forecast.measured import Measured
from llama2_lora.gpus import Accelerator
from llama2_lora.llama2 import LLAMA2_70B, LlamaShape

NETWORK_GB_S = 50  # one 400 Gb/s port a GPU, where a group leaves the fast links
MEMORY_EFFICIENCY = 0.8
BACKWARD = 1.0  # of a frozen linear layer: only the gradient of its input
ATTENTION_BACKWARD = 2.5  # five products instead of two: the scores are computed again


@dataclass(frozen=True)
class Constants:
    efficiency: dict[str, float]
    tp_exposed: float
    cp_layer_seconds: float
    stragglers: float  # more time per doubling of the GPUs
    eval_share: float  # of a forward pass in a training micro-batch
    eval_fixed_seconds: float


# Made by: python benchmarks/fit_timing.py
FITTED = Constants(
    efficiency={"Hopper": 0.550, "Blackwell": 0.491, "MI300X": 0.320, "MI325X": 0.433},
    tp_exposed=1.07,
    cp_layer_seconds=5.18e-4,
    stragglers=0.0298,
    eval_share=0.988,
    eval_fixed_seconds=0.284,
)
# Root mean square of log(forecast / published) over the results that the fit did not see: steps 8.2% (27 results), 4.0%
# (15), 2.8% (2) and 2.3% (3), the small samples rounded up to what time to train shows; evaluations 21% (47).
HELD_OUT_ERROR = {"Hopper": 0.085, "Blackwell": 0.05, "MI300X": 0.05, "MI325X": 0.05}
EVAL_ERROR = 0.21
UNSEEN_ERROR = 0.25  # a guess: bf16, FP4, pipelining, recomputation, offloading, other parts: no published run to fit
UNSEEN_EFFICIENCY = 0.4
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
    shape: LlamaShape = field(default=LLAMA2_70B, repr=False)

    @classmethod
    def from_settings(cls, settings: Settings, accelerator: Accelerator) -> Work:
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
        )

    @property
    def replicas(self) -> int:
        return self.gpus // (self.tp * self.pp * self.cp)

    @property
    def seen(self) -> bool:
        """Whether published results of this kind were there to fit."""
        plain = self.precision == "fp8" and self.pp == 1 and not (self.recompute or self.offload)
        return plain and self.accelerator.family in HELD_OUT_ERROR


@dataclass(frozen=True)
class Interval:
    """A value and the bounds that 9 of 10 published runs would lie between."""

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
    """One optimizer step."""
    micro_batch = _micro_batch_seconds(work, constants)
    bubble = (work.pp - 1) / work.pp * micro_batch  # 1F1B: pp - 1 micro-batches of a stage's share
    return (work.minibs * micro_batch / work.pp + bubble) * _straggling(work, constants)


def eval_seconds(work: Work, constants: Constants = FITTED) -> float:
    """One evaluation of all 173 sequences, forward only."""
    linear, attention = forward_flop(work.shape, work.sequence_length)
    trained = linear * (1 + BACKWARD) + attention * (1 + ATTENTION_BACKWARD)
    forward = _micro_batch_seconds(replace(work, recompute=False), constants) * (linear + attention) / trained
    rounds = math.ceil(rules.EVAL_SEQUENCES / work.replicas)
    return rounds * constants.eval_share * forward * _straggling(work, constants) + constants.eval_fixed_seconds


def with_neighbours(work: Work, step: float, evaluation: float | None) -> tuple[float, float]:
    """Seconds of a step and of an evaluation on all GPUs, where one rank alone takes `step` and `evaluation` (measured.py).

    CP_LAYER_SECONDS counts in full, although a part of it, the smaller kernels, is in the measured time too.
    """
    exposed, slower = _communication_seconds(work, FITTED), _straggling(work, FITTED)
    whole = (step + work.minibs * exposed) * slower
    if evaluation is None:
        return whole, eval_seconds(work)
    rounds = math.ceil(rules.EVAL_SEQUENCES / work.replicas)
    return whole, (evaluation + rounds * exposed / 2) * slower  # half of the collectives are the backward's


def error_of(work: Work) -> float:
    return HELD_OUT_ERROR[work.accelerator.family] if work.seen else UNSEEN_ERROR


def forecast(work: Work, sequences: float, evaluations: float, measured: Measured | None = None) -> dict[str, Interval]:
    """Seconds of a step and of an evaluation, minutes from run_start to run_stop; of the fit, or of a measured rank."""
    if measured is None:
        error, step, evaluation = error_of(work), step_seconds(work), eval_seconds(work)
    else:
        error = MEASURED_ERROR
        step, evaluation = with_neighbours(work, measured.step_seconds, measured.eval_seconds)
    measured_evaluation = measured is not None and measured.eval_seconds is not None
    steps = sequences / (work.minibs * work.replicas)
    minutes = (steps * step + evaluations * evaluation) / 60
    return {
        "step_seconds": Interval.around(step, error),
        "eval_seconds": Interval.around(evaluation, error if measured_evaluation else max(error, EVAL_ERROR)),
        "run_minutes": Interval.around(minutes, error),
    }


def _micro_batch_seconds(work: Work, constants: Constants) -> float:
    """Forward and backward of one sequence on the GPUs of one replica, as if PP were 1."""
    part, shape, share = work.accelerator, work.shape, work.tp * work.cp
    linear, attention = forward_flop(shape, work.sequence_length)
    passes = 2.0 if work.recompute else 1.0
    rate = {"bf16": part.bf16_tflops, "fp8": part.fp8_tflops, "fp4": part.fp4_tflops or part.fp8_tflops}[work.precision]
    matrix = (linear * (passes + BACKWARD) / rate + attention * (passes + ATTENTION_BACKWARD) / part.bf16_tflops) / 1e12
    efficiency = constants.efficiency.get(part.family, UNSEEN_EFFICIENCY)
    # About 50 h + 10 f values of two bytes a token and layer, read or written, forward and backward.
    moved = work.sequence_length * shape.layers * (100 * shape.hidden + 20 * shape.ffn)
    seconds = matrix / share / efficiency + moved / share / (part.memory_tb_s * 1e12 * MEMORY_EFFICIENCY)
    return seconds + _communication_seconds(work, constants)


def _communication_seconds(work: Work, constants: Constants) -> float:
    shape, tp = work.shape, work.tp
    fast = tp <= work.accelerator.domain
    link = (work.accelerator.link_gb_s if fast else NETWORK_GB_S) * 1e9
    # Two all-gathers and two reduce-scatters of [S / CP, h] in bf16 a layer, forward, and as many backward.
    moved = 8 * (tp - 1) / tp * work.sequence_length / work.cp * shape.hidden * 2 * shape.layers
    return constants.tp_exposed * moved / link + constants.cp_layer_seconds * shape.layers * (work.cp > 1)


def _straggling(work: Work, constants: Constants) -> float:
    return 1 + constants.stragglers * math.log2(work.gpus)
