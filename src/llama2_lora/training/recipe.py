"""Settings -> the objects that NeMo trains with. Each function builds one of them; nothing here runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loops import _TrainingEpochLoop  # PRIVATE: lightning 2.4 lightning.pytorch.loops._TrainingEpochLoop
from lightning.pytorch.plugins.environments import TorchElasticEnvironment
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer.enums import AttnBackend
from nemo.collections.llm.gpt.model.llama import Llama2Config70B, LlamaConfig
from nemo.lightning import MegatronStrategy
from nemo.lightning.pytorch.optim import CosineAnnealingScheduler, MegatronOptimizerModule
from nemo.lightning.pytorch.plugins import MegatronMixedPrecision
from nemo.lightning.pytorch.strategies.utils import RestoreConfig
from transformer_engine.pytorch.module import destroy_ub

from llama2_lora.config import rules
from llama2_lora.config.settings import Settings
from llama2_lora.llama2 import LLAMA2_70B, LlamaShape
from llama2_lora.training import graphs
from llama2_lora.training.adapter import SeededLoRA
from llama2_lora.training.evaluation import whole_sequences
from llama2_lora.training.model import LoraLlama, data_step, forward_step
from llama2_lora.training.overlap import build_overlap
from llama2_lora.training.restore import restore

FP4_FORMAT = "e2m1"


def build_config(settings: Settings, shape: LlamaShape) -> LlamaConfig:
    """The model's shape and kernels. Precision and layout are added by the precision plugin and the strategy."""
    performance = settings.performance
    options = dict(
        seq_length=settings.batch.sequence_length,
        vocab_size=shape.vocab,
        data_step_fn=data_step,
        forward_step_fn=forward_step,
        # The fused accumulation needs APEX and weight gradients; the frozen base has none.
        gradient_accumulation_fusion=False,
        # Megatron's fused loss makes its gradient bf16, whatever the logits are (fusions/fused_cross_entropy.py, 0.15.3).
        cross_entropy_loss_fusion=settings.weights_dtype == "BF16",
        recompute_granularity=None if performance.recompute == "none" else performance.recompute,
        recompute_method="uniform" if performance.recompute == "full" else None,
        recompute_num_layers=1 if performance.recompute == "full" else None,
        cp_comm_type=settings.parallel.cp_exchange,
        cpu_offloading=performance.offload_layers > 0,
        cpu_offloading_num_layers=performance.offload_layers,
        cpu_offloading_double_buffering=settings.kernels.offload_double_buffer,
        cross_entropy_fusion_impl=settings.kernels.cross_entropy,
        fused_single_qkv_rope=settings.kernels.qkv_rope_fusion,
        use_transformer_engine_op_fuser=settings.kernels.op_fuser,
    )
    # cuDNN's attention is the only one with FP8, and ruling out the others makes a silent fall-back an error.
    # Megatron refuses NVTE_FLASH_ATTN and friends from the environment: this field sets them.
    options["attention_backend"] = AttnBackend.fused
    options["activation_func_fp8_input_store"] = settings.precision.fp8_swiglu
    if settings.precision.fp4_weights:  # NeMo 2.7.3's precision plugin has no fp4_param, and Megatron refuses it without fp4
        options |= {"fp4": FP4_FORMAT, "fp4_param": True}
    # Delayed scaling shares the largest values of a micro-batch among the ranks that hold parts of it (TP and CP). Other
    # replicas' are not needed: no FP8 tensor crosses data-parallel ranks, and the reduction stays within a node.
    options["tp_only_amax_red"] = True
    # Bulk overlap rides on the weight gradient's GEMM. The frozen base has none, and Transformer Engine 2.9 then leaves
    # the input's gradient unsummed over the TP ranks (layernorm_linear.py): wrong, without an error. See overlap.py.
    options |= {"tp_comm_bulk_wgrad": False, "tp_comm_bulk_dgrad": False, "tp_comm_overlap_rs_dgrad": True}
    if shape == LLAMA2_70B:
        return Llama2Config70B(**options)
    return LlamaConfig(
        num_layers=shape.layers,
        hidden_size=shape.hidden,
        ffn_hidden_size=shape.ffn,
        num_attention_heads=shape.heads,
        num_query_groups=shape.kv_groups,
        layernorm_epsilon=shape.norm_eps,
        rotary_base=shape.rope_base,
        share_embeddings_and_output_weights=shape.tied,
        **options,
    )


def build_lora(settings: Settings, seed: int) -> SeededLoRA:
    o = settings.optimization
    keep_masks = settings.performance.graphs != "none"
    return SeededLoRA(seed, o.lora_rank, o.lora_alpha, o.lora_dropout, keep_masks)


def build_optimizer(settings: Settings) -> MegatronOptimizerModule:
    """AdamW, sharded over the data-parallel ranks, with a cosine to 0."""
    o = settings.optimization
    config = OptimizerConfig(
        optimizer="adam",  # Megatron's name for AdamW: decoupled weight decay is its default
        lr=o.lr,
        weight_decay=o.weight_decay,
        adam_beta1=rules.ADAM_BETAS[0],
        adam_beta2=rules.ADAM_BETAS[1],
        adam_eps=rules.ADAM_EPSILON,
        clip_grad=o.clip_norm,
        use_distributed_optimizer=True,
    )
    # NeMo's default holds the LR for 80,000 constant steps.
    scheduler = CosineAnnealingScheduler(max_steps=o.max_steps, warmup_steps=o.warmup_steps, constant_steps=0, min_lr=0.0)
    return MegatronOptimizerModule(config=config, lr_scheduler=scheduler)


def build_model(
    settings: Settings, shape: LlamaShape, lora: SeededLoRA, optimizer: MegatronOptimizerModule, validation_rows: int
) -> LoraLlama:
    return LoraLlama(build_config(settings, shape), optimizer, lora, settings.global_batch_size, validation_rows)


def build_precision(settings: Settings) -> MegatronMixedPrecision:
    """bf16 with FP8 or FP4 matrix products; fp32 on the CPU."""
    p = settings.precision
    base: dict[str, Any] = dict(precision="32")
    if settings.system.platform == "gpu":
        base = dict(
            precision="bf16-mixed",
            params_dtype=torch.bfloat16,
            grad_reduce_in_fp32=False,  # 45M adapter gradients: bf16 halves the only data-parallel traffic
        )
    return MegatronMixedPrecision(
        **base,
        fp8=p.fp8_format if p.fp8 else None,
        fp8_recipe=p.fp8_recipe,
        fp8_amax_history_len=p.fp8_amax_history,
        fp8_amax_compute_algo=p.fp8_amax_algo,
        fp8_dot_product_attention=p.fp8_attention,
        fp8_param_gather=p.fp8_weights,
        fp4=FP4_FORMAT if p.fp4 else None,
        first_last_layers_bf16=p.first_bf16_layers + p.last_bf16_layers > 0,
        num_layers_at_start_in_bf16=p.first_bf16_layers,
        num_layers_at_end_in_bf16=p.last_bf16_layers,
    )


class SeededStrategy(MegatronStrategy):
    """MegatronStrategy whose generators start from the run's seed, that restores by layer and leaves the model in place.

    evaluates_whole: evaluation has no context parallelism, whatever training has. cuda_graphs: see graphs.py.

    NeMo 2.7.3 starts them from 1234 in every run (megatron_init.py): all runs would draw the same dropout masks. Ranks of
    one tensor-parallel group share theirs, since they may hold the same activations; all others differ.
    """

    def __init__(self, seed: int, evaluates_whole: bool = False, cuda_graphs: str = "none", **options: Any) -> None:
        super().__init__(use_te_rng_tracker=cuda_graphs != "none", **options)
        self.seed, self.evaluates_whole, self.cuda_graphs = seed, evaluates_whole, cuda_graphs

    def connect(self, model: pl.LightningModule) -> None:
        super().connect(model)
        if self.cuda_graphs != "none":
            graphs.configure(model.config, self.cuda_graphs)

    def setup_distributed(self) -> None:
        super().setup_distributed()
        rank = torch.distributed.get_rank() // self.tensor_model_parallel_size
        model_parallel_cuda_manual_seed(self.seed + rank, te_rng_tracker=self.use_te_rng_tracker, force_reset_rng=True)

    def selective_restore(self) -> None:
        restore(self)

    @contextmanager
    def evaluation_layout(self) -> Iterator[None]:
        """What an evaluation, and its warm-up, happens in."""
        layout = whole_sequences(self.megatron_parallel) if self.evaluates_whole else nullcontext()
        with graphs.without_layer_graphs(self.megatron_parallel), layout:
            yield

    def validation_step(self, *arguments: Any, **options: Any) -> Any:
        with self.evaluation_layout():
            return super().validation_step(*arguments, **options)

    def teardown(self) -> None:
        """Give back what outlives the model, and leave the model where it is.

        Lightning's teardown moves it to the CPU, for which Transformer Engine dequantizes FP8 weights and quantizes them
        again: 34 GB a GPU between run_stop and the end of the process. Userbuffers live in a global of Transformer
        Engine, graphs in some of Megatron's.
        """
        destroy_ub()
        if self.cuda_graphs != "none" and self.megatron_parallel is not None:
            graphs.drop_graphs(self.megatron_parallel)
        # PRIVATE: lightning 2.4 lightning.pytorch.strategies.Strategy._lightning_module
        model, self._lightning_module = self._lightning_module, None
        try:
            super().teardown()
        finally:
            self._lightning_module = model


def build_strategy(settings: Settings, seed: int, store: torch.distributed.Store | None = None) -> SeededStrategy:
    """`store` is the rendezvous that the ranks have already met at, if they have."""
    p = settings.parallel
    strategy = SeededStrategy(
        seed,
        evaluates_whole=p.evaluation_cp < p.cp,
        cuda_graphs=settings.performance.graphs,
        tensor_model_parallel_size=p.tp,
        pipeline_model_parallel_size=p.pp,
        context_parallel_size=p.cp,
        sequence_parallel=p.sequence_parallel,
        cluster_environment=TorchElasticEnvironment(),  # RANK and friends, whoever launched us (run_and_time.sh)
        ddp=DistributedDataParallelConfig(use_distributed_optimizer=True, check_for_nan_in_grad=False),
        restore_config=RestoreConfig(path=settings.run.checkpoint_path, load_artifacts=False),
        use_gloo_process_groups=False,  # only saving optimizer state needs them, and they cost init time per rank
        ckpt_async_save=False,
        replace_progress_bar=False,
    )
    strategy.store = store
    return strategy


class EvaluateAtSteps(_TrainingEpochLoop):
    """Lightning's loop with the rules' evaluation steps, which ends at the target.

    Its own val_check_interval cannot skip the first evaluations.
    """

    def __init__(self, trainer: pl.Trainer, settings: Settings) -> None:
        super().__init__(trainer, max_steps=settings.optimization.max_steps)
        self.eval_steps, self.evaluation = settings.eval_steps, settings.evaluation

    # PRIVATE: lightning 2.4 lightning.pytorch.loops._TrainingEpochLoop._should_check_val_fx
    def _should_check_val_fx(self, data_fetcher: object) -> bool:
        return self.global_step in self.eval_steps

    def on_advance_end(self, data_fetcher: Any) -> None:
        super().on_advance_end(data_fetcher)
        if self.global_step in self.eval_steps and self.evaluation.reached(float(self.trainer.callback_metrics["val_loss"])):
            self.trainer.should_stop = True


def build_trainer(settings: Settings, strategy: MegatronStrategy, callbacks: list[pl.Callback]) -> pl.Trainer:
    """A trainer that evaluates when the rules say and keeps quiet. `callbacks` run in the order given."""
    if settings.performance.tp_comm_overlap:
        callbacks = [*callbacks, build_overlap(settings)]
    trainer = pl.Trainer(
        accelerator="cpu" if settings.system.platform == "cpu" else "gpu",
        devices=settings.system.gpus_per_node,
        num_nodes=settings.system.nodes,
        strategy=strategy,
        plugins=[build_precision(settings)],
        max_epochs=1,
        max_steps=settings.optimization.max_steps,
        callbacks=callbacks,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit_loop.epoch_loop = EvaluateAtSteps(trainer, settings)
    return trainer
