"""How long a config's run and job take: the forecast of a step, applied to settings."""

from __future__ import annotations

from dataclasses import dataclass

from llama2_lora.config.settings import Settings
from llama2_lora.config.values import walltime_minutes
from llama2_lora.forecast import measured
from llama2_lora.forecast.generations import of_this_stack
from llama2_lora.forecast.timing import Interval, Work, forecast, forecast_of_rank, step_seconds_with_our_adapter
from llama2_lora.gpus import Accelerator

# Published v4.1 and v5.0 entries: 0.5 to 6.8 minutes, median 1.5 (benchmarks/published_results.csv).
INIT_MINUTES = 3.0


@dataclass(frozen=True)
class Times:
    """The forecast of a run and of the job, against its time limit."""

    step_seconds: Interval
    eval_seconds: Interval
    run_minutes: Interval
    job_minutes: Interval
    samples_per_second: float
    evaluations: float
    walltime_minutes: float
    like_published: bool  # whether published runs of this kind were there to fit
    not_covered: str  # why not
    generation: str  # of the software; empty where the part's published steps did not change with it
    generation_reason: str
    gpus: int
    measured: str = ""  # the GPU on which one rank was measured; empty: a forecast from the fit alone
    fp4_step_seconds: Interval | None = None  # the two phases of a run in FP4
    healed_step_seconds: Interval | None = None
    our_step_seconds: float | None = None  # estimated with this project's adapter, where it moves less than the published one

    def gpu_hours(self) -> tuple[Interval, Interval]:
        """Of one run with its initialization, and of the job."""
        per_run = (INIT_MINUTES + minutes for minutes in (self.run_minutes.low, self.run_minutes.middle, self.run_minutes.high))
        job = (self.job_minutes.low, self.job_minutes.middle, self.job_minutes.high)
        run, whole = (Interval(*(self.gpus * m / 60 for m in minutes)) for minutes in (per_run, job))
        return run, whole


def times_of(settings: Settings, part: Accelerator, steps: float, spread: float, rank: measured.Measured | None) -> Times:
    """For runs of `steps` on average; spread: of the reference's runs around their mean, as a share of it."""
    gbs, trials = settings.global_batch_size, settings.system.trials
    generation = of_this_stack(part)
    work = Work.from_settings(settings, part, generation.name)
    evaluations = (steps - settings.eval_steps.start) / settings.eval_every_steps + 1
    run_of = (work, steps * gbs, evaluations, spread)
    found = forecast(*run_of) if rank is None else forecast_of_rank(*run_of, rank)
    run = found["run_minutes"]
    # Without the overlap, the gather that our adapter leaves to the layer is as exposed as the adapter's was.
    saves = settings.performance.tp_comm_overlap and rank is None and not work.amd and work.precision != "fp4"
    return Times(
        **found,
        our_step_seconds=step_seconds_with_our_adapter(work) if saves else None,
        job_minutes=Interval(*(trials * (minutes + INIT_MINUTES) for minutes in (run.low, run.middle, run.high))),
        samples_per_second=gbs / found["step_seconds"].middle,
        evaluations=evaluations,
        walltime_minutes=walltime_minutes(settings.system.walltime),
        like_published=work.seen,
        measured=rank.gpu if rank else "",
        not_covered=work.not_covered,
        generation=generation.name if work.kind.endswith(generation.name) else "",
        generation_reason=generation.reason,
        gpus=work.gpus,
    )
