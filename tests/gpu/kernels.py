"""Transformer Engine's modules on fixed inputs, with the kernels of the GPU or with those that PLATFORM=cpu has.

python tests/gpu/kernels.py cpu|gpu OUT.npz      writes outputs and gradients by name, as fp32
"""

from __future__ import annotations

import importlib.util
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch

TOKENS, HIDDEN, OUT, HEADS, GROUPS, HEAD = 256, 128, 384, 8, 2, 64


def numbers(seed: int, *shape: int, scale: float = 1.0) -> torch.Tensor:
    """The same on both sides: made on the CPU."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(shape, generator=generator, device="cpu") * scale


def linear_layers(te: Any, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Forward and input gradient of both kinds of frozen linear layer, in FP8 with delayed scaling, after two steps of it."""
    from transformer_engine.common.recipe import DelayedScaling, Format

    common = dict(bias=False, params_dtype=dtype, device="cuda")
    layers = {
        "linear": te.Linear(HIDDEN, OUT, **common),
        "norm_linear": te.LayerNormLinear(HIDDEN, OUT, normalization="RMSNorm", **common),
    }
    recipe = DelayedScaling(fp8_format=Format.HYBRID, amax_history_len=4, amax_compute_algo="max")
    found = {}
    for name, layer in layers.items():
        with torch.no_grad():
            layer.weight.copy_(numbers(1, OUT, HIDDEN, scale=0.02).to("cuda", dtype))
        layer.requires_grad_(False)
        for step in range(2):
            x = numbers(2 + step, TOKENS, HIDDEN).to("cuda", dtype).requires_grad_()
            with te.fp8_autocast(enabled=True, fp8_recipe=recipe):
                y = layer(x)
            y.backward(numbers(4 + step, TOKENS, OUT).to("cuda", dtype))
        found |= {f"{name}.output": y.detach(), f"{name}.gradient": x.grad}
    return found


def attention(te: Any, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Causal, grouped queries, cuDNN's kernel: forward and gradients of query, key and value."""
    core = te.DotProductAttention(
        HEADS, HEAD, num_gqa_groups=GROUPS, attn_mask_type="causal", qkv_format="sbhd", attention_dropout=0.0
    )
    shapes = [(TOKENS, 1, heads, HEAD) for heads in (HEADS, GROUPS, GROUPS)]
    qkv = [numbers(10 + i, *shape).to("cuda", dtype).requires_grad_() for i, shape in enumerate(shapes)]
    out = core(*qkv)
    out.backward(numbers(20, *out.shape).to("cuda", dtype))
    return {"attention.output": out.detach()} | {f"attention.gradient_{n}": t.grad for n, t in zip("qkv", qkv, strict=True)}


def adam(te: Any) -> dict[str, torch.Tensor]:
    weight = torch.nn.Parameter(numbers(30, OUT, HIDDEN).to("cuda"))
    optimizer = te.optimizers.FusedAdam([weight], lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-4)
    for step in range(3):
        weight.grad = numbers(31 + step, OUT, HIDDEN).to("cuda")
        optimizer.step()
    return {"adam.weight": weight.detach()}


def main(where: str, out: Path) -> None:
    if where == "cpu":
        from llama2_lora.training.cpu import cpu_platform, extension

        if not extension.FOLDER.is_dir():  # its Python is that of any installation
            extension.FOLDER = Path(importlib.util.find_spec("transformer_engine").origin).parents[1]
        platform, dtype = cpu_platform(), torch.float32
    else:
        platform, dtype = nullcontext(), torch.bfloat16
    with platform:
        import transformer_engine.pytorch as te

        found = linear_layers(te, dtype) | attention(te, dtype) | adam(te)
    np.savez(out, **{name: tensor.float().cpu().numpy() for name, tensor in found.items()})


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
