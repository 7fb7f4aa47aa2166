"""Transformer Engine on a CPU: its own Python, with its C++ extension `transformer_engine_torch` in plain torch.

The wheel `transformer_engine` holds all of the Python and no kernels. `load` puts it in sys.modules with a stand-in for the
extension, before Megatron looks for it. Every call that training makes has its kernel in a module beside this one; any other
raises with its name when it is called.

The wheel lies in a folder of its own, not in site-packages, since on the path without its kernels it breaks others: `import
peft` and `import megatron.core` then end in "Found empty `transformer-engine` meta package installed".
"""

from __future__ import annotations

import importlib
import importlib.machinery
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch

from llama2_lora.training.cpu import attention, dtypes, gemm, norms, optimizer, per_tensor, quantize, rope, userbuffers

# scripts/setup_env.sh installs the wheel in the environment's folder; else it may lie beside a folder of PYTHONPATH.
PLACES = [Path(sys.prefix), *(Path(entry).parent for entry in sys.path)]
FOLDER = next((p for p in PLACES if (p / "transformer_engine/transformer_engine").is_dir()), PLACES[0]) / "transformer_engine"
KERNELS = (
    quantize.quantize,
    quantize.dequantize,
    per_tensor.fp8_transpose,
    per_tensor.fused_amax_and_scale_update_after_reduction,
    gemm.generic_gemm,
    norms.rmsnorm_fwd,
    norms.rmsnorm_bwd,
    attention.get_fused_attn_backend,
    attention.fused_attn_fwd,
    attention.fused_attn_bwd,
    rope.fused_rope_forward,
    rope.fused_rope_backward,
    rope.fused_qkv_rope_forward,
    rope.fused_qkv_rope_backward,
    optimizer.multi_tensor_adam,
    optimizer.multi_tensor_l2norm,
    optimizer.multi_tensor_scale,
    userbuffers.CommOverlap,
    userbuffers.CommOverlapP2P,
    userbuffers.CommOverlapHelper,
    userbuffers.bulk_overlap_ag_with_external_gemm,
    userbuffers.device_supports_multicast,
    userbuffers.ubuf_built_with_mpi,
    userbuffers.get_stream_priority_range,
    userbuffers.get_num_cublas_streams,
)

# Mentioned by the Python at every forward pass, through a name that only an import of * makes, and never called here.
MENTIONED = ("layernorm_fwd", "layernorm_bwd")


class Missing:
    """A name of the extension without a kernel here: it may be imported and mentioned; a call raises."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> Missing:
        if name.startswith("__"):
            raise AttributeError(name)
        return Missing(f"{self._name}.{name}")

    def __call__(self, *_: Any, **__: Any) -> Any:
        raise NotImplementedError(f"{self._name}: has no CPU kernel (llama2_lora/training/cpu)")


class _Extension(ModuleType):
    def __getattr__(self, name: str) -> Missing:
        if name.startswith("__"):
            raise AttributeError(name)
        return Missing(f"{self.__name__}.{name}")


def load() -> None:
    """Import Transformer Engine with the stand-in, once per process. Afterwards Megatron finds it like any other package.

    Raises:
        RuntimeError: the wheel is not there, a real Transformer Engine is, or Megatron was imported without it.
    """
    if isinstance(sys.modules.get("transformer_engine_torch"), _Extension):
        return
    if "transformer_engine" in sys.modules:
        raise RuntimeError("PLATFORM=cpu: a Transformer Engine with CUDA kernels is imported already; use PLATFORM=gpu")
    if "megatron.core.extensions.transformer_engine" in sys.modules or "megatron.core.utils" in sys.modules:
        raise RuntimeError("PLATFORM=cpu: megatron.core was imported before Transformer Engine; enter cpu_platform first")
    package = FOLDER / "transformer_engine"
    if not package.is_dir():
        raise RuntimeError(f"PLATFORM=cpu: Transformer Engine is not in {FOLDER}; run scripts/setup_env.sh")
    sys.path.append(str(FOLDER))  # NeMo and Megatron ask for the version of the distribution as well
    sys.modules["transformer_engine_torch"] = _extension()
    for name in ("", ".permutation", ".pad", ".cross_entropy"):  # Triton's kernels, and there is no Triton on a CPU
        full = f"transformer_engine.pytorch.triton{name}"
        sys.modules[full] = _Extension(full)
    _import_package(package)


def _import_package(folder: Path) -> None:
    """The package without its __init__, which looks for a CUDA build and goes on without kernels where there is none."""
    package = ModuleType("transformer_engine")
    package.__path__, package.__version__ = [str(folder)], version("transformer_engine")  # type: ignore[attr-defined]
    package.__spec__ = importlib.machinery.ModuleSpec("transformer_engine", None, is_package=True)
    sys.modules["transformer_engine"] = package
    # transformer_engine.common loads no library where it is being built
    with patch.dict(os.environ, {"NVTE_PROJECT_BUILDING": "1"}):  # noqa: TID251
        common = importlib.import_module("transformer_engine.common")
    common.load_framework_extension = lambda framework: None
    for name in ("common", "pytorch"):
        setattr(package, name, importlib.import_module(f"transformer_engine.{name}"))


def _extension() -> ModuleType:
    module = _Extension("transformer_engine_torch")
    names = [name for name in vars(dtypes) if name[0].isupper() and name != "TORCH_DTYPE"]
    for name in names:
        setattr(module, name, getattr(dtypes, name))
    for kernel in KERNELS:
        setattr(module, kernel.__name__, kernel)
    for name in MENTIONED:
        setattr(module, name, Missing(f"transformer_engine_torch.{name}"))
    module.get_cublasLt_version = lambda: 130000  # type: ignore[attr-defined]
    module.get_cudnn_version = lambda: 91300  # type: ignore[attr-defined]
    module.__all__ = [name for name in vars(module) if not name.startswith("__")]  # type: ignore[attr-defined]
    return module


class _Seen:
    """A module with a few names of its own: what one module of Transformer Engine sees under that module's name."""

    def __init__(self, module: Any, **own: Any) -> None:
        self.__dict__.update(own, _module=module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def stand_ins() -> Iterator[tuple[Any, str, Any]]:
    """Yield (module, name, what it is meanwhile) for what torch's answers alone cannot settle. Transformer Engine 2.9."""
    at = "transformer_engine.pytorch"
    # QuantizedTensor.__new__ passes current_device() to _make_wrapper_subclass, which no function mode sees: an int would make
    # a tensor on "cuda:0". NeMo needs an int of the same function (nemo/lightning/io/pl.py).
    cuda = _Seen(torch.cuda, current_device=lambda: torch.device("cpu"))
    yield importlib.import_module(f"{at}.tensor.quantized_tensor"), "torch", _Seen(torch, cuda=cuda)
    # Attention takes fp16 and bf16 alone: get_attention_backend finds none for fp32 and says so.
    for name in ("backends", "utils"):
        module = importlib.import_module(f"{at}.attention.dot_product_attention.{name}")
        yield module, "torch", _Seen(torch, float16=torch.float32)
    # MXFP8 and NVFP4 gather bytes and scales in one call, which gloo has not: "does not implement startCoalescing".
    distributed = _Seen(torch.distributed, _coalescing_manager=_one_by_one)
    yield importlib.import_module(f"{at}.distributed"), "torch", _Seen(torch, distributed=distributed)
    # The backward pass of context parallelism waits twice for one exchange (context_parallel.py, "wait until dKV is received",
    # then "wait until KV is received"). NCCL does not mind; a gloo work that has been waited for waits for the next message.
    ring = importlib.import_module(f"{at}.attention.dot_product_attention.context_parallel")
    exchange = ring.flash_attn_p2p_communicate
    yield ring, "flash_attn_p2p_communicate", lambda *args: [_WaitOnce(work) for work in exchange(*args)]


@contextmanager
def forgotten_answers() -> Iterator[None]:
    """Transformer Engine asks for the device once and keeps the answer: not beyond the context, nor from before it."""
    modules = [importlib.import_module(f"transformer_engine.pytorch.{name}") for name in ("utils", "quantization")]
    kept = [value for module in modules for value in vars(module).values() if hasattr(type(value), "cache_clear")]
    for function in kept:
        function.cache_clear()
    try:
        yield
    finally:
        for function in kept:
            function.cache_clear()


@contextmanager
def _one_by_one(*_: Any, **__: Any) -> Iterator[Any]:
    """Collectives run when they are called; afterwards there is nothing to wait for."""
    yield SimpleNamespace(wait=lambda: None)


class _WaitOnce:
    """A request of torch.distributed that may be waited for again."""

    def __init__(self, work: torch.distributed.Work) -> None:
        self._work: torch.distributed.Work | None = work

    def wait(self) -> None:
        if self._work is not None:
            self._work.wait()
        self._work = None
