"""The rehearsal's base model: a small Llama that has read reports, but no summary.

It stands in for Llama-2-70B: grouped queries, RMSNorm, RoPE, SwiGLU and untied embeddings in the proportions of Llama-2,
saved in the same Hugging Face format, so that convert_model.py and training treat both alike. From here on it is frozen.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llama2_lora import files
from llama2_lora.data import packed

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

SHAPE = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "attention_bias": False,
}
STEPS = 600
ROWS = 8  # per step
LR, WEIGHT_DECAY, CLIP_NORM = 3e-3, 0.1, 1.0
THREADS = 2  # at most: more do not help a model of this size, and the weights' last digits depend on how many


def new_model(vocab_size: int, sequence_length: int, seed: int) -> LlamaForCausalLM:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(min(THREADS, torch.get_num_threads()))
    torch.manual_seed(seed)
    # transformers' defaults for <s> and </s> are 1 and 2, as in the tokenizer.
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, max_position_embeddings=sequence_length, **SHAPE))


def bar_options(terminal: bool) -> dict[str, Any]:
    """A bar for the eye, a line a minute for a batch job's log."""
    if terminal:
        return dict(mininterval=2)
    return dict(mininterval=60, maxinterval=60, bar_format="{desc}: step {n_fmt} of {total_fmt}, {elapsed}{postfix}\n")


def pretrain(model: LlamaForCausalLM, tokens: np.ndarray, steps: int, seed: int) -> None:
    """AdamW with a cosine to 0, on random windows of `tokens`."""
    import torch
    from tqdm import tqdm

    length = model.config.max_position_embeddings
    rng = np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    bar = tqdm(range(steps), desc="pre-train", unit="step", ncols=100, **bar_options(sys.stderr.isatty()))
    for _ in bar:
        starts = rng.integers(0, len(tokens) - length + 1, ROWS)
        ids_BS = torch.from_numpy(np.stack([tokens[start : start + length] for start in starts]).astype(np.int64))
        loss = model(input_ids=ids_BS, labels=ids_BS).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        bar.set_postfix_str(f"loss {loss.item():.3f}", refresh=False)


def make(data: Path, output: Path, steps: int, seed: int) -> bool:
    """Make the folder where it is not up to date; returns whether it had to. Raises ValueError where `data` is not whole."""
    text = data / "base_text.npy"
    manifest = packed.read_manifest(data / "gov_report")
    if manifest is None or not text.is_file():
        raise ValueError(f"--data {data}: is not complete; run scripts/rehearsal_data.py --output {data}")
    recipe = "\n".join([*map(files.file_sha256, (Path(__file__), text)), f"steps {steps} seed {seed}"])
    if files.is_up_to_date(output, recipe):
        return False
    with files.new_folder(output, recipe) as folder:
        model = new_model(manifest["vocab_size"], manifest["sequence_length"], seed)
        pretrain(model, np.load(text), steps, seed)
        model.save_pretrained(folder)
        shutil.copytree(data / "tokenizer", folder, dirs_exist_ok=True)
    return True
