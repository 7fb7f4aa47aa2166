"""Training without CUDA: what PLATFORM=cpu adds, so that the GPU recipe runs on two CPU cores over gloo.

    platform     cpu_platform, the context that everything happens in
    device       torch.cuda's answers for one pretended device
    extension    Transformer Engine's Python, with its C++ extension made of the kernels below
    dtypes       the extension's enumerations
    quantize     FP8 with a scale per tensor             blocks      block scaling, MXFP8
    nvfp4        NVFP4                                   gemm        matrix products
    norms        RMSNorm                                 attention   fused attention, in FP8 too (attention_fp8)
    rope         rotary embeddings                       optimizer   multi-tensor Adam, norm, scale
    userbuffers  tensor-parallel collectives inside products
    graphs       torch.cuda's graphs: operations recorded and replayed

Nothing here is imported on a GPU, and nothing of training/ outside knows of it.
"""

from __future__ import annotations

from llama2_lora.training.cpu.device import capability_for
from llama2_lora.training.cpu.platform import cpu_platform

__all__ = ["capability_for", "cpu_platform"]
