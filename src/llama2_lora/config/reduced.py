"""A cluster's config on two CPU cores: what of it changes, and to what. All else stays as the config has it.

    source config_GB200_2x4x2.sh && python -m llama2_lora.config.reduced

prints an `export` per change, with what it was, for scripts/rehearse.sh to take.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator

from llama2_lora.config.settings import Settings, SettingsError

RANKS = 2  # of two cores; four where TP and CP are both over 1, so that both are there
SEQUENCE_LENGTH = 256  # tokens, as in the rehearsal
STEPS = 8
EVALUATE_EVERY = 2  # steps; with the evaluations that the rules skip at this GBS, the first one is at step 6


def reduced(settings: Settings) -> dict[str, str]:
    """Value of every variable that two cores ask for. GBS is what MINIBS and the replicas that are left make of it."""
    p, system, minibs, precision = settings.parallel, settings.system, settings.batch.minibs, settings.precision
    tp, pp, cp = (min(size, 2) for size in (p.tp, p.pp, p.cp))
    replicas = min(settings.data_parallel_size, max(1, RANKS // (tp * pp * cp)))
    ranks = replicas * tp * pp * cp
    changes = {
        "PLATFORM": "cpu",
        "ACCELERATOR": "CPU",
        "DGXSYSTEM": f"{system.name}_1x{ranks}x{minibs}",
        "CONFIG_FILE": "",  # the file's name is the whole system's
        "DGXNNODES": "1",
        "DGXNGPU": str(ranks),
        "TP": str(tp),
        "PP": str(pp),
        "CP": str(cp),
        "MAX_SEQLEN": str(SEQUENCE_LENGTH),
        "MAX_STEPS": str(STEPS),
        "EVAL_EVERY_SEQUENCES": str(EVALUATE_EVERY * minibs * replicas),
        "LOG_EVERY_STEPS": "1",
        "NEXP": "1",
    }
    if p.validation_cp is not None:
        changes["VAL_CP"] = str(min(p.validation_cp, 2))
    if precision.fp4_heal_step is not None:  # at the same share of the run, before the first evaluation
        changes["FP4_HEAL_STEP"] = str(max(1, precision.fp4_heal_step * STEPS // settings.optimization.max_steps))
    for name in ("WARMUP_TRAIN_STEPS", "WARMUP_VALIDATION_STEPS"):  # CUDA graphs are made in the second
        changes[name] = str(min(settings.value(name), 1 if settings.performance.graphs == "none" else 2))
    return changes


def lines(settings: Settings) -> Iterator[str]:
    """The changes that are ones, for a shell and for the eye."""
    for name, value in reduced(settings).items():
        old = settings.value(name)
        was = str(int(old) if isinstance(old, bool) else old)
        if was != value:
            yield f"export {name}={shlex.quote(value)} # in place of {was}"


def main() -> int:
    try:
        print(*lines(Settings.from_env()), sep="\n")
    except SettingsError as error:
        print(*(f"error: {problem}" for problem in error.problems), sep="\n", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
