#!/usr/bin/env python3
"""What our parts add to a run: from the start of the process to the end of the first step, and the log's callback per step.

    python benchmarks/start_and_log.py [--runs 3] [--steps 200]

Start: `src/train.py` against NeMo's `llm.finetune` (its recipes' trainer, logger off) with NeMo's LoRA: one rank, the same
small Llama restored from the same checkpoint, GBS 8, both on the CPU's Transformer Engine, by turns, the best run counts. Ours
also checks settings, data and checkpoint, and writes the log up to the first loss; NeMo's data are made up in memory.

Callback: its hook of a step is timed inside a real run that logs every step, or every tenth (the default). The limit is 1%
of 0.17 s, the shortest step that is forecast. On a GPU a logged step also waits for the loss; that is not in the figure.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]
SHORTEST_STEP_SECONDS = 0.17
SIZES = dict(hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4)
FIRST_STEP = re.compile(r'"key": "train_loss"|^first step')


class Cost(NamedTuple):
    seconds: float
    cpu_seconds: float
    peak_mib: float


def make_inputs(folder: Path) -> None:
    from helpers.training_runs import make_data, make_model

    make_model(folder / "hf", **SIZES)
    make_data(folder / "data")
    convert = [sys.executable, ROOT / "scripts/convert_model.py", "--source", folder / "hf"]
    subprocess.run([*convert, "--output_path", folder / "checkpoint"], check=True, capture_output=True)


def environment(folder: Path, **changes: str) -> dict[str, str]:
    from helpers.training_runs import Tiny, clean_environment, free_port

    (folder / "results").mkdir(exist_ok=True)
    run = Tiny(folder / "hf", folder / "checkpoint", folder / "data").environment(folder / "results", **changes)
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    return clean_environment(**run, **ranks, PYTHONPATH=f"{ROOT}/src:{ROOT}/tests", PYTHONWARNINGS="ignore")


def until_first_step(command: list[object], folder: Path) -> Cost:
    started, output = time.perf_counter(), ""
    with subprocess.Popen(
        [sys.executable, "-u", *map(str, command)],
        env=environment(folder),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        for line in process.stdout or ():
            output += line
            if FIRST_STEP.search(line):
                cost = Cost(time.perf_counter() - started, *cpu_and_peak(process.pid))
                process.kill()
                return cost
    raise SystemExit(f"{command[0]} ended before its first step:\n{output[-4000:]}")


def cpu_and_peak(pid: int) -> tuple[float, float]:
    """CPU seconds of a process, all threads, and the peak of its memory in MiB."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    ticks = int(fields[11]) + int(fields[12])
    peak = re.search(r"VmHWM:\s*(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return ticks / os.sysconf("SC_CLK_TCK"), int(peak[1]) / 1024 if peak else 0.0


def nemo_finetune(folder: Path) -> None:
    """What NeMo's recipes build (recipes/finetune_default.py), for one CPU rank."""
    from llama2_lora.training.cpu import cpu_platform

    with cpu_platform():
        import lightning.pytorch as pl
        from nemo import lightning as nl
        from nemo.collections import llm
        from nemo.collections.common.tokenizers import AutoTokenizer
        from nemo.collections.llm.recipes.optim.adam import distributed_fused_adam_with_cosine_annealing
        from nemo.utils.exp_manager import TimingCallback

        from llama2_lora.weights.checkpoint import read_shape

        class SayWhen(pl.Callback):
            def on_train_batch_end(self, *_: object) -> None:
                print("first step", flush=True)

        shape, tokenizer = read_shape(folder / "checkpoint"), AutoTokenizer(str(folder / "hf"))
        config = llm.LlamaConfig(
            num_layers=shape.layers,
            hidden_size=shape.hidden,
            ffn_hidden_size=shape.ffn,
            num_attention_heads=shape.heads,
            num_query_groups=shape.kv_groups,
            seq_length=shape.max_positions,
            vocab_size=shape.vocab,
            gradient_accumulation_fusion=False,  # needs APEX
            cross_entropy_loss_fusion=False,
        )
        optimizer = distributed_fused_adam_with_cosine_annealing(max_lr=1e-4, warmup_steps=0)
        optimizer.config.bf16, optimizer.config.use_precision_aware_optimizer = False, False
        data = llm.MockDataModule(shape.max_positions, tokenizer, 2, 8, num_train_samples=64, num_workers=0, pin_memory=False)
        llm.finetune(
            model=llm.LlamaModel(config, tokenizer=tokenizer),
            data=data,
            trainer=nl.Trainer(
                accelerator="cpu",
                devices=1,
                max_steps=2,
                limit_val_batches=0,
                log_every_n_steps=1,
                use_distributed_sampler=False,
                strategy=nl.MegatronStrategy(gradient_as_bucket_view=True, ckpt_load_strictness="log_all"),
                plugins=nl.MegatronMixedPrecision(precision="32"),
                callbacks=[TimingCallback(), SayWhen()],
            ),
            log=nl.NeMoLogger(log_dir=str(folder / "nemo"), use_datetime_version=False),
            resume=nl.AutoResume(restore_config=nl.RestoreConfig(path=str(folder / "checkpoint"))),
            optim=build(optimizer),
            peft=llm.peft.LoRA(target_modules=["linear_qkv", "linear_proj"], dim=16, alpha=32, dropout=0.1),
        )


def build(config: object) -> object:
    import fiddle

    return fiddle.build(config)


def timed_hooks(folder: Path, steps: int, log_every: int) -> None:
    """Print microseconds of the callback's hook per step, on the clock and of CPU, in a real run."""
    from helpers.training_runs import train_here
    from llama2_lora.training.cpu import cpu_platform

    with cpu_platform():
        from llama2_lora.training.callback import MLPerfCallback
    original, clocks = MLPerfCallback.on_train_batch_end, []

    def timed(self: MLPerfCallback, *arguments: object) -> None:
        started, cpu_started = time.perf_counter(), time.thread_time()
        original(self, *arguments)
        clocks.append((time.perf_counter() - started, time.thread_time() - cpu_started))

    train = {"MAX_STEPS": str(steps), "LOG_EVERY_STEPS": str(log_every), "EVAL_EVERY_SEQUENCES": str(8 * steps)}
    with patch.object(MLPerfCallback, "on_train_batch_end", timed):
        train_here(dict(os.environ) | train)
    clocks = clocks[1:]  # the first step also looks at every adapter's gradient
    wall, cpu = (1e6 * sum(column) / len(clocks) for column in zip(*clocks, strict=True))
    print(f"hooks {wall:.1f} {cpu:.1f}", flush=True)


def hook_microseconds(folder: Path, steps: int, log_every: int) -> tuple[float, float]:
    command = [sys.executable, __file__, "--hooks", folder, "--steps", str(steps), "--log_every", str(log_every)]
    done = subprocess.run(command, env=environment(folder), capture_output=True, text=True)
    found = re.search(r"^hooks (\S+) (\S+)", done.stdout, flags=re.M)
    if found is None:
        raise SystemExit(f"the run ended without a figure:\n{done.stderr[-4000:]}")
    return float(found[1]), float(found[2])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--nemo", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--hooks", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--log_every", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.nemo:
        nemo_finetune(arguments.nemo)
        return
    if arguments.hooks:
        timed_hooks(arguments.hooks, arguments.steps, arguments.log_every)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_inputs(folder)
        costs: list[list[Cost]] = [[], []]
        for _ in range(arguments.runs):
            costs[0].append(until_first_step([__file__, "--nemo", folder], folder))
            costs[1].append(until_first_step([ROOT / "src/train.py"], folder))
        hooks = {every: hook_microseconds(folder, arguments.steps, every) for every in (1, 10)}
    nemo, ours = (Cost(*map(min, zip(*runs, strict=True))) for runs in costs)
    print(f"{'to the end of the first step':<32}{'NeMo':>10} {'':<4}{'ours':>10} {'':<4}{'ratio':>10}")
    for text, theirs, own, unit in zip(("clock", "CPU", "peak memory"), nemo, ours, ("s", "s", "MiB"), strict=True):
        print(f"{text:<32}{theirs:>10,.4g} {unit:<4}{own:>10,.4g} {unit:<4}{theirs / own:>10,.3g} x")
    print(f"\n{'callback and log, a step':<32}{'clock':>10} {'':<4}{'CPU':>10} {'':<4}{'of 0.17 s':>10}")
    for every, (wall, cpu) in hooks.items():
        share = wall / 1e6 / SHORTEST_STEP_SECONDS
        print(f"{f'LOG_EVERY_STEPS={every}':<32}{wall:>10,.4g} {'us':<4}{cpu:>10,.4g} {'us':<4}{share:>10.3%}")


if __name__ == "__main__":
    main()
