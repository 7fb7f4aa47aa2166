"""Which tensor-parallel collectives hide behind which matrix products, and how: userbuffers of Transformer Engine 2.9.

Under sequence parallelism a layer gathers and reduce-scatters [S, H] four times forward and four times backward:

    forward    gather -> linear_qkv    linear_proj -> reduce-scatter    gather -> linear_fc1    linear_fc2 -> reduce-scatter
    backward   the same from right to left: each gather becomes a reduce-scatter, each reduce-scatter a gather

Where the base trains, the collectives of linear_qkv's and linear_fc1's backward hide behind the weight gradient ("bulk"). A
frozen base has none: they hide behind the product of the input's gradient itself, or behind nothing.

`initialize_ub` makes twelve buffers whatever it is told. Eight are used here; `forecast/memory.py` counts the other four, since
there is no option to leave them out, and whether an early end of one gives its memory back can only be seen on a GPU.
"""

from __future__ import annotations

from nemo.collections.llm.recipes.tp_overlap_configs.userbuffers import (
    PipelineOverlapCfg,
    RingExchangeOverlapCfg,
    TransformerLayerTPOverlapCfg,
)
from nemo.lightning.pytorch.callbacks.megatron_comm_overlap import MegatronCommOverlapCallback

from llama2_lora.config.settings import Settings
from llama2_lora.gpus import accelerator_of

# Streaming multiprocessors that the reduce-scatter behind linear_proj takes from the product: as NVIDIA tuned hidden 8192
# (NeMo 2.7.3, recipes/tp_overlap_configs, TP4 on H100 and TP2 on B200). linear_proj's product is short, so its collective is
# the longer half and gets more of them; Blackwell has more to give.
PROJ_SMS = {"Hopper": 24, "Blackwell": 32}
FC2_SMS = 16


def userbuffers(settings: Settings) -> TransformerLayerTPOverlapCfg:
    """Of one layer: None is a buffer that no product uses."""
    part = accelerator_of(settings.system.accelerator, settings.system.name)
    proj_sms = PROJ_SMS["Blackwell" if part is not None and part.nvfp4 else "Hopper"]
    return TransformerLayerTPOverlapCfg(
        # Gather before a product: each rank's rows go round the ring while the product of those that are there runs. The copy
        # engines send them, so no multiprocessor is lost; Transformer Engine has no other method for a gather.
        qkv_fprop=RingExchangeOverlapCfg(),
        fc1_fprop=RingExchangeOverlapCfg(),
        proj_dgrad=RingExchangeOverlapCfg(),
        fc2_dgrad=RingExchangeOverlapCfg(),
        # Reduce-scatter after a product, forward: the product runs in four parts, the collective of each beside the next. The
        # ring would sum in multiprocessors as well, with 1.75 times the memory at TP 4 (2 TP - 1 pieces for TP).
        proj_fprop=_pipeline(proj_sms),
        fc2_fprop=_pipeline(FC2_SMS),
        # Reduce-scatter after a product, backward: as a ring, the published way for fc1 on H100; linear_qkv's has the same
        # flag of Megatron's (tp_comm_overlap_rs_dgrad). Without them both collectives are exposed.
        qkv_dgrad=RingExchangeOverlapCfg(),
        fc1_dgrad=RingExchangeOverlapCfg(),
        # There is no weight gradient
        qkv_wgrad=None,
        fc1_wgrad=None,
    )


def _pipeline(sms: int) -> PipelineOverlapCfg:
    # fp8_buf: NeMo 2.7.3's default is the tuple (False,), which is true: the partial sums would be rounded to FP8 before they
    # are added, and the rows that come out would be.
    return PipelineOverlapCfg(num_sm=sms, cga_size=2, num_splits=4, set_sm_margin=True, fp8_buf=False)


def build_overlap(settings: Settings) -> MegatronCommOverlapCallback:
    """The callback that makes the buffers before the first step."""
    return MegatronCommOverlapCallback(
        tp_comm_overlap=True,
        tp_comm_overlap_cfg=userbuffers(settings),
        # NCCL and not MPI, so that srun --mpi=none serves
        tp_comm_bootstrap_backend="gloo" if settings.system.platform == "cpu" else "nccl",
        overlap_grad_reduce=False,  # the adapter's gradients are 90 MB a step, 54 MB a rank at TP 4: there is nothing to hide
        overlap_param_gather=False,
    )
