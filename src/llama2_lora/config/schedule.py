"""Batch sizes, evaluation steps and learning rate: pure functions of a few integers.

Steps count from 1: "step 10" is the state after ten optimizer updates. Sources are cited in rules.py.
"""

from __future__ import annotations

import math

from llama2_lora.config import rules

# Layers that the warm-up runs in FP8 too where FP4_HEAL_STEP is set: weights in FP4 and FP8 of all would not fit. Kernels and
# shapes are alike in all but the first one, whose input asks for no gradient.
HEALED_LAYERS = 2


def data_parallel_size(nodes: int, gpus_per_node: int, tp: int, pp: int, cp: int) -> int:
    """Number of model replicas. Raises ValueError where the model-parallel group does not divide the GPUs."""
    world, model = nodes * gpus_per_node, tp * pp * cp
    if world % model:
        raise ValueError(f"TP*PP*CP={tp}*{pp}*{cp}={model}: must divide DGXNNODES*DGXNGPU={nodes}*{gpus_per_node}={world}")
    return world // model


def skipped_evaluations(gbs: int) -> int:
    """How many evaluations of the cadence are left out at the start of a run."""
    return math.floor(rules.EVAL_SKIP_PER_GBS * gbs + rules.EVAL_SKIP_BASE)


def eval_every_steps(gbs: int, every_sequences: int = rules.EVAL_EVERY_SEQUENCES) -> int:
    """Optimizer steps between two evaluations: rounded up where GBS does not divide 384."""
    return math.ceil(every_sequences / gbs)


def first_eval_step(gbs: int, every_sequences: int = rules.EVAL_EVERY_SEQUENCES, skip: int | None = None) -> int:
    """The step after which the first evaluation runs; `skip` None takes the rule's number."""
    skip = skipped_evaluations(gbs) if skip is None else skip
    return (skip + 1) * eval_every_steps(gbs, every_sequences)


def eval_steps(gbs: int, max_steps: int, every_sequences: int = rules.EVAL_EVERY_SEQUENCES, skip: int | None = None) -> range:
    """All steps in 1..max_steps after which the run evaluates, until it reaches the target."""
    first = first_eval_step(gbs, every_sequences, skip)
    return range(first, max_steps + 1, eval_every_steps(gbs, every_sequences))


def learning_rate(step: int, base: float, max_steps: int, warmup_steps: int = 0) -> float:
    """LR that the update after `step` finished steps uses: linear warm-up, then a cosine that ends at 0."""
    if step < warmup_steps:
        return base * (step + 1) / (warmup_steps + 1)
    if step >= max_steps:
        return 0.0
    progress = (step - warmup_steps) / (max_steps - warmup_steps)
    return base * 0.5 * (1.0 + math.cos(math.pi * progress))
