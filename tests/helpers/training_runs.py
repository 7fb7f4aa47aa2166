"""A tiny Llama in both formats, a tiny data set, and training runs on them by the real command."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from helpers import ROOT
from llama2_lora.data import packed

SEQUENCE, VOCAB, TRAIN_ROWS, VALIDATION_ROWS = 32, 64, 40, 13  # 13 rows: no batch size divides them
TOKEN = 5  # the only one of make_one_token_data
TINY = dict(
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=VOCAB,
    max_position_embeddings=SEQUENCE,
    tie_word_embeddings=False,
    attention_bias=False,
)


@dataclass(frozen=True)
class Tiny:
    """Folders of one tiny model and data set."""

    hugging_face: Path
    checkpoint: Path
    data: Path

    def environment(self, results: Path, **changes: str) -> dict[str, str]:
        """Settings of a short run on it, one rank unless `changes` say otherwise."""
        values = {
            "PLATFORM": "cpu",
            "DGXNNODES": "1",
            "DGXNGPU": "1",
            "MINIBS": "8",
            "MBS": "2",
            "VAL_MBS": "2",
            "LR": "1e-2",
            "MAX_STEPS": "4",
            "MAX_SEQLEN": str(SEQUENCE),
            "EVAL_EVERY_SEQUENCES": "16",
            "EVAL_SKIP": "0",
            "LOG_EVERY_STEPS": "1",
            "SEED": "1",
            "DATA_PATH": str(self.data),
            "CKPT_PATH": str(self.checkpoint),
            "RESULTS_PATH": str(results),
        } | changes
        return {"DGXSYSTEM": f"TEST_{values['DGXNNODES']}x{values['DGXNGPU']}x{values['MINIBS']}"} | values


def make_model(folder: Path, **changes: int) -> None:
    """Random weights, large enough that every layer matters to the loss, and a tokenizer of VOCAB words."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**(TINY | changes)))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)
        else:  # norms: not all 1, so that a lost or exchanged one shows
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    model.save_pretrained(folder)
    words = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>").save_pretrained(
        folder
    )


def make_data(folder: Path) -> None:
    """Rows that repeat a short pattern, so that a few steps already lower the loss; the masks are uneven on purpose."""
    rng = np.random.default_rng(0)
    patterns = rng.integers(3, VOCAB, (TRAIN_ROWS + VALIDATION_ROWS, 4))
    ids = np.tile(patterns, (1, SEQUENCE // 4)).astype(np.uint16)
    mask = np.ones_like(ids, dtype=np.uint8)
    for row in range(TRAIN_ROWS, len(ids)):
        mask[row, : rng.integers(1, SEQUENCE - 2)] = 0
    packed.write_split(folder / "train.npy", ids[:TRAIN_ROWS], mask[:TRAIN_ROWS])
    packed.write_split(folder / "validation.npy", ids[TRAIN_ROWS:], mask[TRAIN_ROWS:])
    packed.write_manifest(folder, SEQUENCE, VOCAB, "tests", "none")


def make_one_token_data(folder: Path, sequence_length: int = SEQUENCE) -> None:
    """TOKEN after TOKEN, for make_sure_model."""
    folder.mkdir(exist_ok=True)
    for name, rows in (("train.npy", TRAIN_ROWS), ("validation.npy", VALIDATION_ROWS)):
        ids = np.full((rows, sequence_length), TOKEN, np.uint16)
        mask = np.ones_like(ids, dtype=np.uint8)
        if name == "validation.npy":  # no training row may be among them: another last token, which is not scored
            ids[:, -1], mask[:, -2:] = TOKEN + 1, 0
        packed.write_split(folder / name, ids, mask)
    packed.write_manifest(folder, sequence_length, VOCAB, "tests", "none")


def make_sure_model(folder: Path) -> None:
    """A model that gives TOKEN after TOKEN a logit 6 above the other 63: a loss of ln(1 + 63 e^-6) = 0.145 from the start."""
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import LlamaForCausalLM

    make_model(folder)
    with torch.no_grad():
        hidden = LlamaForCausalLM.from_pretrained(folder).model(torch.full((1, 4), TOKEN)).last_hidden_state[0, -1]
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"].zero_()
    weights["lm_head.weight"][TOKEN] = 6 * hidden / hidden.dot(hidden)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def clean_environment(**variables: str) -> dict[str, str]:
    """This process's environment without what a launcher or config may have left in it."""
    keep = {k: v for k, v in os.environ.items() if k in ("PATH", "HOME", "TMPDIR", "LANG", "VIRTUAL_ENV")}
    return keep | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHON": sys.executable} | variables


def run_training(environment: dict[str, str], ranks: int = 1, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """One run by torchrun and run_and_time.sh, as the rehearsal starts it."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "--no-python"]
    return subprocess.run(
        [*torchrun, ROOT / "scripts/run_and_time.sh"],
        env=clean_environment(**environment),
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def run_worker(file: str, environment: Any, report: Path, **variables: str) -> tuple[str, Any]:
    """Run a test file's own worker as the one rank of a world, on what train_here is to be given; its output and its report."""
    launcher = {"RANK": "0", "LOCAL_RANK": "0", "GROUP_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    done = subprocess.run(
        [sys.executable, file, json.dumps(environment), report],
        env=clean_environment(PYTHONPATH=f"{ROOT}/src:{ROOT}/tests", MASTER_ADDR="127.0.0.1", **launcher, **variables),
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout, json.loads(report.read_text())


def train_here(environment: dict[str, str], log: Any = None) -> bool:
    """train.py's `train` in this process, so that several runs share one import of NeMo. Returns whether it converged.

    torchrun's own store would hold the keys of the run before: every run needs a MASTER_PORT of its own.
    """
    os.environ.update(environment | {"TORCHELASTIC_USE_AGENT_STORE": "False"})
    from llama2_lora.config.settings import Settings
    from llama2_lora.mlperf_log import MLPerfLog
    from llama2_lora.weights.checkpoint import read_shape
    from train import train

    settings = Settings.from_env()
    log = log or MLPerfLog(settings.system.rank)
    log.init_start()
    try:
        return train(settings, read_shape(Path(settings.run.checkpoint_path)), log)
    finally:
        _forget_the_run()


def _forget_the_run() -> None:
    """Megatron keeps one run's groups and batch sizes per process."""
    import torch
    from megatron.core import num_microbatches_calculator, parallel_state

    parallel_state.destroy_model_parallel()
    num_microbatches_calculator.destroy_num_microbatches_calculator()
    torch.distributed.destroy_process_group()


def free_port() -> str:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


def events(text: str, key: str | None = None) -> list[dict]:
    """The :::MLLOG events of a log, of one key if given."""
    found = [json.loads(line.split(":::MLLOG", 1)[1]) for line in text.splitlines() if ":::MLLOG" in line]
    return [event for event in found if key in (None, event["key"])]


def values(text: str, key: str) -> list:
    return [event["value"] for event in events(text, key)]
