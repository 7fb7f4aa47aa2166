#!/usr/bin/env python3
"""scripts/convert_model.py against NeMo's own llm.import_ckpt, in one run, on a Llama of 1.7 GB with random weights.

    python benchmarks/conversion.py --work_dir DIR      about 5 GB of disk, 7 GB of memory, three minutes

Every way runs in a process of its own, on files in the page cache; `cp` is the floor. Time is the whole
process's, imports included. Memory is the peak of resident memory (VmHWM) above a bare interpreter's.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from helpers.tiny_llama import hf_config, write_tokenizer
from llama2_lora.llama2 import LlamaShape, hf_tensors

ROOT = Path(__file__).resolve().parents[1]
SHAPE = LlamaShape(
    layers=2,
    hidden=4096,
    ffn=8192,
    heads=32,
    kv_groups=8,
    vocab=16000,
    max_positions=4096,
    norm_eps=1e-5,
    rope_base=10000.0,
    tied=False,
)
REPORT = "peak_mib"


def write_source(folder: Path) -> int:
    """One safetensors file of small random fp32 numbers (import_ckpt refuses bf16 without Transformer Engine); its bytes."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(hf_config(SHAPE)))
    write_tokenizer(folder, SHAPE.vocab)
    header: dict = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, dims in hf_tensors(SHAPE).items():
        start, end = end, end + int(np.prod(dims)) * 4
        header[name] = {"dtype": "F32", "shape": dims, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    rng = np.random.default_rng(0)
    path = folder / "model.safetensors"
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for start in range(0, end // 4, 1 << 24):
            count = min(1 << 24, end // 4 - start)
            file.write(rng.standard_normal(count, dtype=np.float32) * 0.02)
    return path.stat().st_size


def import_ckpt(source: Path, output: Path) -> None:
    """NeMo's way."""
    from llama2_lora.training.cpu import cpu_platform

    with cpu_platform():
        from nemo.collections import llm
        from nemo.collections.llm.gpt.model import llama

        # The fused accumulation is a kernel of APEX, which is not there
        unfused = partial(llama.LlamaConfig, gradient_accumulation_fusion=False)
        any_model = llm.LlamaModel(unfused(num_layers=1, hidden_size=8, num_attention_heads=1))
        config = llama.HFLlamaImporter.config.fget

        def config_without_apex(self: llama.HFLlamaImporter) -> llama.LlamaConfig:
            with patch.object(llama, "LlamaConfig", unfused):
                return config(self)

        with patch.object(llama.HFLlamaImporter, "config", property(config_without_apex)):
            llm.import_ckpt(any_model, f"hf://{source}", output_path=output)


def measure(name: str, command: list[object], output: Path) -> dict:
    """Wall and CPU seconds and peak memory of a process; its output is removed."""
    os.sync()  # what was written before must not slow this one down
    before, started = os.times(), time.monotonic()
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    seconds, after = time.monotonic() - started, os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    peak = re.findall(rf"{REPORT} (\d+)", done.stdout)
    shutil.rmtree(output)
    return {"name": name, "seconds": seconds, "cpu": cpu, "mib": int(peak[-1]) if peak else 0}


def python(code: str, *arguments: object) -> list[object]:
    """A process that runs `code` and then prints its peak memory."""
    report = f"import re; print('{REPORT}', int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]) // 1024)"
    return [sys.executable, "-W", "ignore", "-c", f"import sys\nif __name__ == '__main__':\n {code}\n {report}", *arguments]


def report(rows: list[dict], bare_mib: int, size: int) -> None:
    print(f"model: {size / 1e9:.2f} GB in fp32, {SHAPE.parameters() / 1e6:.0f}M weights")
    print(f"{'':30} {'s':>7} {'MB/s':>7} {'faster':>7} {'CPU s':>7} {'less':>7} {'MiB':>7} {'less':>7}")
    reference = rows[-1]
    for row in rows:
        faster, rate = reference["seconds"] / row["seconds"], size / 1e6 / row["seconds"]
        line = f"{row['name']:30} {row['seconds']:7.1f} {rate:7.0f} {faster:6.1f}x"
        line += f" {row['cpu']:7.1f} {reference['cpu'] / row['cpu']:6.1f}x"
        if row["mib"]:
            mib = row["mib"] - bare_mib
            line += f" {mib:7} {(reference['mib'] - bare_mib) / mib:6.1f}x"
        print(line)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_dir", type=Path, required=True, help="folder for the models; emptied at the end")
    folder = parser.parse_args().work_dir.resolve() / "convert_model"
    shutil.rmtree(folder, ignore_errors=True)
    source, output = folder / "hf", folder / "out"
    size = write_source(source)
    script = (
        "import runpy; sys.argv = sys.argv[1:]; sys.path.insert(0, ''); "
        "runpy.run_path(sys.argv[0], run_name='convert_model')['main']()"
    )
    convert = [ROOT / "scripts/convert_model.py", "--source", source, "--output_path", output, "--format"]
    nemo = f"sys.path.insert(0, {str(ROOT / 'benchmarks')!r}); from pathlib import Path; import conversion as b"
    nemo += f"; b.import_ckpt(Path({str(source)!r}), Path({str(output)!r}))"
    bare = measure("interpreter", [*python("import os; os.mkdir(sys.argv[1])", output)], output)
    rows = [
        measure("cp", ["cp", "-r", source, output], output),
        measure("convert_model.py, zarr", python(script, *convert, "zarr"), output),
        measure("convert_model.py, torch_dist", python(script, *convert, "torch_dist"), output),
        measure("llm.import_ckpt", python(nemo), output),
    ]
    shutil.rmtree(folder)
    report(rows, bare["mib"], size)
    return 0


if __name__ == "__main__":
    sys.exit(main())
