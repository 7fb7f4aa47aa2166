"""A plan for people: tables of text, and a picture."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from llama2_lora.config import schedule
from llama2_lora.findings import PIPE_WIDTH, Finding
from llama2_lora.forecast.cost import Rates, cost
from llama2_lora.forecast.measured import Measured, beside
from llama2_lora.forecast.memory import GB, Memory
from llama2_lora.forecast.plan import Plan
from llama2_lora.forecast.times import Times
from llama2_lora.forecast.timing import Interval

Rows = list[tuple[str, str]]
KERNELS, KERNEL_NAME = 12, 90  # of a measurement: how many are shown, and how much of a name
STATES = {"ok": "ok ", "unknown": "?  "}  # of a check; else NOT


def show_plan(plan: Plan, inside: list[Finding] | None, rates: Rates) -> None:
    """All tables; `inside` is what this node's own checks found."""
    for title, rows in _sections(plan, inside, rates):
        _print(title, rows)


def _print(title: str, rows: Rows) -> None:
    console = Console(soft_wrap=False)
    if not console.is_terminal:
        console = Console(width=PIPE_WIDTH)
    console.print(escape(title), style="bold")  # a table's own title folds at the table's width
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(no_wrap=True, min_width=26)
    table.add_column()
    for name, text in rows:
        table.add_row(escape(name), escape(text))
    console.print(table)
    console.print()


def _sections(plan: Plan, inside: list[Finding] | None, rates: Rates) -> Iterator[tuple[str, Rows]]:
    yield f"{plan.config}: ranks", _layout_rows(plan)
    yield "Schedule", _schedule_rows(plan)
    if plan.rules:
        yield "Rules", [_check_row(rule) for rule in plan.rules]
    if plan.rehearsal:
        text = "a small model: neither is forecast, and no rule applies"
        yield "Memory and time", [(f"{plan.platform.upper()} rehearsal", text)]
    if plan.forecast:
        yield f"Time on {plan.accelerator}: a forecast", _time_rows(plan.forecast, rates)
    if plan.memory:
        yield f"Memory per GPU, {plan.accelerator}, GB", _memory_rows(plan.memory)
    if inside is not None:
        yield "This node", [_check_row(check) for check in inside]


def _check_row(check: Finding) -> tuple[str, str]:
    where = f" ({check.where})" if check.where else ""
    return check.code, f"{STATES.get(check.level, 'NOT')} {check.text.removeprefix(f'{check.code}: ')}{where}"


def _layout_rows(plan: Plan) -> Rows:
    rows = []
    for dimension in plan.layout:
        ranks, where = dimension.ranks, "within a node" if dimension.within_a_node else "across nodes"
        listed = ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")
        members = f"  {where}; rank 0 with {listed}" if dimension.size > 1 else ""
        rows.append((dimension.group, f"{dimension.size}{members}"))
    b = plan.batch
    accumulation = f"MBS {b.micro_batch_size}, gradient accumulation {b.gradient_accumulation_steps}"
    rows.append(("GBS", f"{b.global_batch_size} = {b.data_parallel} replicas x MINIBS {b.minibs} ({accumulation})"))
    return rows


def _schedule_rows(plan: Plan) -> Rows:
    evaluation, reference, gbs = plan.evaluation, plan.convergence, plan.batch.global_batch_size
    steps = evaluation.steps
    listed = ", ".join(f"{step} ({step * gbs:,})" for step in steps[:4]) + (", ..." if len(steps) > 4 else "")
    rows = [("evaluations, step (sequences)", listed or "none"), ("then", f"every {evaluation.every_steps} steps")]
    rows.append(("LR at step", "  ".join(f"{step}: {lr:.3g}" for step, lr in plan.learning_rate.points)))
    if reference:
        mean, bound = reference.mean, reference.bound
        rows.append(("reference converges after", f"{mean:,.0f} sequences = {mean / gbs:.0f} steps on average"))
        below = f"below {reference.reference:,.0f} the score is scaled up"
        rows.append(("RCP", f"{below}; a mean of 10 runs below {bound:,.0f} fails the check"))
    return rows


def _time_rows(times: Times, rates: Rates) -> Rows:
    def interval(value: Interval, unit: str) -> str:
        return f"{value.middle:.3g} {unit} ({value.low:.3g} to {value.high:.3g})"

    rows = [("step", interval(times.step_seconds, "s") + f", {times.samples_per_second:.3g} samples/s")]
    if times.our_step_seconds:
        rows.append(("", f"as published; with this adapter, which moves less, {times.our_step_seconds:.2f} s: an estimate"))
    rows.append(("evaluation", interval(times.eval_seconds, "s") + f", {times.evaluations:.1f} a run"))
    rows.append(("run", interval(times.run_minutes, "min")))
    rows.append(("job", interval(times.job_minutes, "min") + f" of WALLTIME {times.walltime_minutes:.0f} min"))
    if times.fp4_step_seconds and times.healed_step_seconds:
        two = f"FP4 {times.fp4_step_seconds.middle:.3g} s, then FP8 {times.healed_step_seconds.middle:.3g} s"
        rows.append(("", f"{two} from FP4_HEAL_STEP on; the step above is their mean"))
    run, job = times.gpu_hours()
    rows.append(("cost of a run", f"{cost(run.middle, rates)} ({run.low:.3g} to {run.high:.3g} GPU-hours)"))
    rows.append(("cost of the job", f"{cost(job.middle, rates)} ({job.low:.3g} to {job.high:.3g} GPU-hours)"))
    if times.generation:
        rows.append(("software", f"of {times.generation}: {times.generation_reason}"))
    if times.measured:
        rows.append(("", f"one rank measured on {times.measured}; communication and stragglers from the fit"))
    elif times.not_covered:
        rows.append(("not covered", f"{times.not_covered}: the interval is a guess"))
    return rows


def _memory_rows(memory: Memory) -> Rows:
    rows = [(item.name, f"{item.bytes / GB:7.2f}  [{item.source}]") for item in memory.items]
    rows.append(("total", f"{memory.total / GB:7.2f}  of {memory.capacity / GB:.1f}: {memory.verdict}"))
    return rows


def show_measured(measured: Measured, account: Memory | None, rates: Rows) -> None:
    """What scripts/measure.py saw. `rates`: rows that need more than the file."""
    _print(f"{measured.config}: one rank, on {measured.gpu}", _measured_rows(measured) + rates)
    if measured.memory and (account or measured.memory.items):
        title = "Memory of the rank, GB: measured" + (", and preflight's account" if account else "")
        _print(title, _beside_rows(measured, account))
    total = sum(kernel.seconds for kernel in measured.kernels)
    if total:
        rows = [(f"{k.seconds / total:6.1%}", f"{k.calls:6} x  {k.name[:KERNEL_NAME]}") for k in measured.kernels[:KERNELS]]
        _print("One training step by kernels", rows)


def _measured_rows(measured: Measured) -> Rows:
    rows: Rows = []
    for p in measured.passes:
        steps = p.step_seconds
        if steps:
            spread = f"{min(steps):.4g} to {max(steps):.4g} in {len(steps)} steps"
            evaluation = "" if p.eval_seconds is None else f"; evaluation {p.eval_seconds:.4g} s"
            rows.append((f"{p.layers} layers", f"step {median(steps):.4g} s ({spread}){evaluation}"))
    if measured.extrapolated:
        evaluation = "" if measured.eval_seconds is None else f"; evaluation {measured.eval_seconds:.4g} s"
        rows.append((f"{measured.stage_layers} layers", f"step {measured.step_seconds:.4g} s{evaluation}: extrapolated"))
    if measured.collective_seconds:
        rows.append(("of a step", f"{measured.collective_seconds:.3g} s are copies that stand for collectives"))
    if measured.warmup_seconds is not None:
        rows.append(("warm-up", f"{measured.warmup_seconds:.3g} s"))
    return rows


def _beside_rows(measured: Measured, account: Memory | None) -> Rows:
    assert measured.memory is not None
    if account is None:
        return [(item.name, f"{measured.item_bytes(item) / GB:9.4f}") for item in measured.memory.items]
    rows = [(name, f"{_gb(ours):>7}  {theirs / GB:7.2f}") for name, ours, theirs in beside(measured, account)]
    total = measured.memory_bytes
    return [*rows, ("total", f"{_gb(total):>7}  {account.total / GB:7.2f}  of {account.capacity / GB:.1f}")]


def _gb(size: float | None) -> str:
    return "-" if size is None else f"{size / GB:.2f}"


def plot(plan: Plan, file: Path) -> None:
    """LR, evaluations and memory as a picture. ValueError where the name's suffix is no format that can be written."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(13, 4.5), width_ratios=(3, 2), layout="constrained")
    gbs, lr = plan.batch.global_batch_size, plan.learning_rate
    steps = range(lr.max_steps + 1)
    curve = [schedule.learning_rate(step, lr.base, lr.max_steps, lr.warmup_steps) for step in steps]
    left.plot([step * gbs for step in steps], curve, label="learning rate")
    for i, sequences in enumerate(plan.evaluation.sequences):
        left.axvline(sequences, color="0.85", linewidth=0.8, zorder=0, label="evaluation" if i == 0 else None)
    if reference := plan.convergence:
        left.axvline(reference.mean, color="tab:green", label="reference converges")
        left.axvline(reference.bound, color="tab:red", linestyle="--", label="RCP bound")
    left.set(xlabel="sequences", ylabel="learning rate", title=plan.config, xlim=(0, None), ylim=(0, None))
    left.legend()
    if memory := plan.memory:
        items = sorted(memory.items, key=lambda item: item.bytes)
        right.barh([item.name for item in items], [item.bytes / GB for item in items])
        right.set(xlabel="GB per GPU", title=f"{memory.total / GB:.0f} of {memory.capacity / GB:.0f} GB")
    else:
        right.set_axis_off()
    try:
        figure.savefig(file, dpi=120)
    except ValueError as error:
        raise ValueError(f"{file}: cannot be drawn: {error}") from None
