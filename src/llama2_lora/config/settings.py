"""The only reader of the environment: shell variables -> one frozen `Settings` value.

Each field is one line: default, variable, unit or choices, what it does; its type chooses the parser (values.py). What
excludes what is in conflicts/. `Settings.from_env()` parses and checks all of them and reports every problem at once.
`python -m llama2_lora.config.page > docs/settings.md` writes the table of settings.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import Field, dataclass, fields
from typing import Any, get_type_hints

from llama2_lora.config import conflicts, rules, schedule
from llama2_lora.config.values import SettingsError, parse_group, window
from llama2_lora.config.values import setting as _setting
from llama2_lora.gpus import ACCELERATORS

INT32 = 2**31 - 1


# scripts/lib/launcher.sh finds the variables that training reads by `_setting("NAME"` in this file: keep both on a field's line.
# fmt: off
@dataclass(frozen=True, kw_only=True, slots=True)
class System:
    """The machine and the job."""
    platform: str = _setting("PLATFORM", "gpu", "Where the model runs; `cpu` is for rehearsals", choices=("gpu", "cpu"))
    small: bool = _setting("REHEARSAL", False, "A small model on generated data, to which no rule applies; on a CPU every run is one")
    name: str = _setting("DGXSYSTEM", doc="System and shape, as in the config's file name: `NAME_NODESxGPUSxMINIBS`")
    nodes: int = _setting("DGXNNODES", doc="Nodes of the job", low=1, high=4096)
    gpus_per_node: int = _setting("DGXNGPU", doc="GPUs (ranks) per node", low=1, high=72)
    accelerator: str = _setting("ACCELERATOR", "", "GPU model that memory and time are forecast for", choices=("", *ACCELERATORS, "CPU"))
    walltime: str = _setting("WALLTIME", "60", "Time limit of the whole job, for `sbatch -t`", unit="Slurm time")
    memory_check: str = _setting("MEMORY_CHECK", "fail", "What preflight makes of a config whose account of memory does not fit", choices=("fail", "warn"))
    trials: int = _setting("NEXP", rules.RUNS_PER_RESULT, "Training runs in one job", low=1, high=1000)
    world_size: int | None = _setting("WORLD_SIZE", None, "Ranks, from the launcher", low=1)
    rank: int = _setting("RANK", 0, "This process's rank, from the launcher", low=0, beside="WORLD_SIZE")
    local_rank: int = _setting("LOCAL_RANK", 0, "This process's rank on its node, from the launcher", low=0, beside="WORLD_SIZE")
    config_file: str = _setting("CONFIG_FILE", "", "Name of the config that was sourced; config_common.sh sets it")


@dataclass(frozen=True, kw_only=True, slots=True)
class Submission:
    """What the log says of the submitter."""
    division: str = _setting("MLPERF_DIVISION", "closed", "Rules that apply", choices=("closed", "open"))
    organization: str = _setting("MLPERF_SUBMITTER", "unofficial", "Submitting organization")
    status: str = _setting("MLPERF_STATUS", "research", "Availability of the system", choices=("onprem", "cloud", "preview", "research"))
    platform: str = _setting("MLPERF_SYSTEM_NAME", "", "Name of the system; default: DGXSYSTEM")


@dataclass(frozen=True, kw_only=True, slots=True)
class Parallel:
    """How one model replica is laid out."""
    tp: int = _setting("TP", 1, "Tensor parallel size", low=1)
    pp: int = _setting("PP", 1, "Pipeline parallel size", low=1)
    cp: int = _setting("CP", 1, "Context parallel size", low=1)
    cp_exchange: str = _setting("CP_COMM", "p2p", "How attention meets all keys under CP: `p2p` in a ring behind the products; `a2a` trades tokens for heads, two exchanges a pass: wins where CP is inside NVLink, needs CP * TP to divide the KV heads; `all_gather`: needs FP8_DPA=0", choices=("p2p", "a2a", "all_gather"))
    validation_cp: int | None = _setting("VAL_CP", None, "Context parallel size of the evaluation, CP or 1: with 1 a rank evaluates whole rows of its own and exchanges nothing; wins where 173 rows fill the ranks; excludes TP_COMM_OVERLAP; default: CP", low=1)
    sequence_parallel: bool = _setting("SP", False, "Sequence parallelism over the TP group")

    @property
    def model_parallel_size(self) -> int:
        return self.tp * self.pp * self.cp

    @property
    def evaluation_cp(self) -> int:
        return self.cp if self.validation_cp is None else self.validation_cp


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Sequences per step. GBS = MINIBS * DP."""
    minibs: int = _setting("MINIBS", doc="Sequences that one model replica takes per optimizer step", low=1, unit="sequences")
    micro: int = _setting("MBS", 1, "Micro batch size; gradient accumulation is MINIBS / MBS", low=1, unit="sequences")
    validation_micro: int = _setting("VAL_MBS", 1, "Micro batch size of the evaluation", low=1, high=rules.EVAL_SEQUENCES, unit="sequences")
    sequence_length: int = _setting("MAX_SEQLEN", rules.SEQUENCE_LENGTH, "Tokens per sequence", low=2, unit="tokens")
    mask_alignment: str = _setting("LOSS_MASK_ALIGN", "nvidia", "Which target a loss-mask entry belongs to: `nvidia` pairs mask[t] with token t+1, `reference` pairs mask[t+1] with it", choices=("nvidia", "reference"))

    @property
    def gradient_accumulation_steps(self) -> int:
        return self.minibs // self.micro


@dataclass(frozen=True, kw_only=True, slots=True)
class Optimization:
    """AdamW, cosine to 0, and the adapter."""
    lr: float = _setting("LR", doc="Base learning rate", low=1e-8, high=1)
    max_steps: int = _setting("MAX_STEPS", doc="Optimizer steps at which the cosine ends and the run gives up", low=1, high=100_000, unit="steps")
    warmup_ratio: float = _setting("LR_WARMUP_RATIO", 0.0, "Share of MAX_STEPS with a linearly rising LR", low=0, high=1)
    clip_norm: float = _setting("GRADIENT_CLIP_NORM", rules.GRADIENT_CLIP_NORM, "Global gradient norm limit", low=0)
    weight_decay: float = _setting("WEIGHT_DECAY", rules.WEIGHT_DECAY, "AdamW weight decay", low=0)
    lora_rank: int = _setting("LORA_RANK", rules.LORA_RANK, "LoRA rank", low=1)
    lora_alpha: int = _setting("LORA_ALPHA", rules.LORA_ALPHA, "LoRA alpha; the adapter is scaled by alpha / rank", low=1)
    lora_dropout: float = _setting("LORA_DROPOUT", rules.LORA_DROPOUT, "Dropout on the adapter's input", low=0, high=0.99)

    @property
    def warmup_steps(self) -> int:
        return math.ceil(self.warmup_ratio * self.max_steps)


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """When to evaluate and when to stop."""
    target_loss: float = _setting("TARGET_LOSS", rules.TARGET_LOSS, "Evaluation loss that ends the run", low=0, unit="nats")
    every_sequences: int = _setting("EVAL_EVERY_SEQUENCES", rules.EVAL_EVERY_SEQUENCES, "Evaluation cadence, rounded up to whole steps", low=1, unit="sequences")
    skip: int | None = _setting("EVAL_SKIP", None, "Evaluations left out at the start; default: the rule's floor(0.125 * GBS + 2)", low=0)

    def reached(self, loss: float) -> bool:
        """Whether an evaluation loss ends the run: at the target or below (rules §9.4)."""
        return loss <= self.target_loss


@dataclass(frozen=True, kw_only=True, slots=True)
class Precision:
    """bf16 (fp32 on the CPU) with FP8 or FP4 matrix products."""
    fp8: bool = _setting("FP8", False, "FP8 linear layers")
    fp8_recipe: str = _setting("FP8_RECIPE", "delayed", "FP8 scaling", choices=("delayed", "tensorwise", "mxfp8", "blockwise"))
    fp8_format: str = _setting("FP8_FORMAT", "hybrid", "E4M3 everywhere, or `hybrid`: E5M2 for gradients", choices=("hybrid", "e4m3"))
    fp8_amax_algo: str = _setting("FP8_AMAX_ALGO", "most_recent", "How delayed scaling reads the amax history", choices=("most_recent", "max"))
    fp8_amax_history: int = _setting("FP8_AMAX_HISTORY", 4, "Length of the amax history of delayed scaling", low=1, unit="micro-batches")
    fp8_attention: bool = _setting("FP8_DPA", False, "FP8 dot product attention")
    fp8_weights: bool = _setting("FP8_PARAMS", False, "Keep the frozen weights in FP8 only: halves their memory")
    fp8_swiglu: bool = _setting("FP8_ACT", False, "Keep SwiGLU's input for the backward pass in FP8: halves the largest activation; needs FP8=1 or FP4=1")
    fp4: bool = _setting("FP4", False, "NVFP4 linear layers (Blackwell)")
    fp4_weights: bool = _setting("FP4_PARAMS", False, "Keep the frozen weights in NVFP4 only, quantized once: 1.1 bytes a weight instead of 3.1; needs FP4=1. FP4_HEAL_STEP then makes FP8 weights of the NVFP4 ones: what four bits lost stays lost")
    fp4_heal_step: int | None = _setting("FP4_HEAL_STEP", None, "Steps in FP4 after which the linear layers run in FP8 (FP8_RECIPE, FP8_FORMAT): wins where FP4 alone misses the target; published runs switch at 350 of 550; needs FP4=1; default: never", low=1, unit="steps")
    first_bf16_layers: int = _setting("BF16_FIRST_LAYERS", 0, "Layers at the start whose products stay in bf16: for a loss that low precision costs; excludes FP8_RECIPE=delayed, FP8_PARAMS and FP4_PARAMS", low=0, unit="layers")
    last_bf16_layers: int = _setting("BF16_LAST_LAYERS", 0, "The same at the end", low=0, unit="layers")


@dataclass(frozen=True, kw_only=True, slots=True)
class Kernels:
    """Which kernels do the work, not what they compute. Off until a GPU has shown that they win."""
    qkv_rope_fusion: bool = _setting("QKV_ROPE_FUSION", False, "Rotary embedding on the packed query, key and value: wins a split and a concatenation a layer")
    cross_entropy: str = _setting("CROSS_ENTROPY", "native", "Kernel of the loss: Megatron's, or `te`, Transformer Engine's in Triton: wins memory, since the gradient overwrites the logits; `te` needs PLATFORM=gpu", choices=("native", "te"))
    op_fuser: bool = _setting("OP_FUSER", False, "Transformer Engine's op fuser runs the MLP: wins launches and the SwiGLU input's cast; needs TP=1 and PLATFORM=gpu, excludes RECOMPUTE, CPU_OFFLOAD_LAYERS and FP4_HEAL_STEP")
    offload_double_buffer: bool = _setting("OFFLOAD_DOUBLE_BUFFER", False, "Two buffers for offloaded activations, so that the next layer's arrive while one is in use: wins where the host link limits; needs CPU_OFFLOAD_LAYERS")


@dataclass(frozen=True, kw_only=True, slots=True)
class Performance:
    """What changes speed and memory, not the result."""
    tp_comm_overlap: bool = _setting("TP_COMM_OVERLAP", False, "Overlap tensor-parallel communication with GEMMs through userbuffers; needs SP, excludes FP4, FP8_RECIPE=blockwise, BF16_FIRST_LAYERS and BF16_LAST_LAYERS")
    recompute: str = _setting("RECOMPUTE", "none", "Activation recomputation", choices=("none", "selective", "full"))
    graphs: str = _setting("CUDA_GRAPHS", "none", "What the GPU repeats without the host: every `layer` of a training step, or the whole `iteration`, evaluation too: wins where the host is slower than the GPU, that is few tokens a GPU; keeps the dropout masks (a byte a value); needs PP=1 and warm-up steps, excludes RECOMPUTE and CPU_OFFLOAD_LAYERS", choices=("none", "layer", "iteration"))
    offload_layers: int = _setting("CPU_OFFLOAD_LAYERS", 0, "Layers whose activations are offloaded to host memory", low=0, unit="layers")
    warmup_train_steps: int = _setting("WARMUP_TRAIN_STEPS", 0, "Synthetic training steps before the clock starts", low=0, unit="steps")
    warmup_validation_steps: int = _setting("WARMUP_VALIDATION_STEPS", 0, "Synthetic evaluation batches before the clock starts", low=0, unit="batches")
    log_every_steps: int = _setting("LOG_EVERY_STEPS", 10, "Cadence of the logged train loss", low=1, unit="steps")


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """Files and seed of one run. The paths are those inside the container."""
    data_path: str = _setting("DATA_PATH", "/data", "Folder of train.npy and validation.npy")
    checkpoint_path: str = _setting("CKPT_PATH", "/ckpt", "Folder of the NeMo checkpoint: context/ and weights/")
    results_path: str = _setting("RESULTS_PATH", "/results", "Folder that the run writes to")
    save_adapter: bool = _setting("SAVE_ADAPTER", False, "Write the adapter to RESULTS_PATH/adapter_SEED after run_stop")
    trial: str = _setting("TRIAL_NAME", "", "Name of this run's log without its ending, from run.sub")
    seed: int | None = _setting("SEED", None, "Seed; default: from /dev/urandom, the same on every rank", low=0, high=INT32)


@dataclass(frozen=True, kw_only=True, slots=True)
class Observe:
    """What to watch of a run, off unless set. It writes to RESULTS_PATH/observe_SEED, power to RESULTS_PATH/power."""
    nsys_steps: str = _setting("OBSERVE_NSYS", "", "Steps that Nsight Systems records, on OBSERVE_RANKS", unit="first-last")
    profile_steps: str = _setting("OBSERVE_PROFILE", "", "Steps that PyTorch's profiler records, on OBSERVE_RANKS", unit="first-last")
    memory_step: int | None = _setting("OBSERVE_MEMORY", None, "Step at which the allocator's history is kept, on OBSERVE_RANKS", low=1)
    ranks: str = _setting("OBSERVE_RANKS", "0", "Ranks that the three above watch", unit="rank,rank,...")
    step_times: bool = _setting("OBSERVE_STEP_TIMES", False, "Every rank's own time of every step; the slowest rank is named")
    power_seconds: float = _setting("OBSERVE_POWER", 0.0, "Seconds between readings of the GPUs' power and clocks; 0: none", low=0, high=60)

    @property
    def nsys_window(self) -> range:
        return window(self.nsys_steps)

    @property
    def profile_window(self) -> range:
        return window(self.profile_steps)

    @property
    def rank_list(self) -> list[int]:
        return [int(rank) for rank in self.ranks.split(",")]

    @property
    def anything(self) -> bool:
        return bool(self.nsys_steps or self.profile_steps or self.memory_step or self.step_times or self.power_seconds)
# fmt: on


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One run, resolved. Read-only; handed down as an argument."""

    system: System
    submission: Submission
    parallel: Parallel
    batch: Batch
    optimization: Optimization
    evaluation: Evaluation
    precision: Precision
    kernels: Kernels
    performance: Performance
    run: Run
    observe: Observe

    @classmethod
    def from_env(cls, env: Mapping[str, str] | None = None) -> Settings:
        """Parse and check. Raises SettingsError with every problem, one per line."""
        env = os.environ if env is None else env  # the one place that reads it
        problems: list[str] = []
        groups = {name: parse_group(group, env, problems) for name, group in GROUPS.items()}
        settings = cls(**groups)
        problems += conflicts.contradictions(settings, complete=not problems)
        if problems:
            raise SettingsError(problems)
        return settings

    def value(self, variable: str) -> Any:
        """The resolved value of an environment variable's field."""
        group, f = FIELDS[variable]
        return getattr(getattr(self, group), f.name)

    @property
    def rehearsal(self) -> bool:
        """Whether the run proves nothing to MLPerf: a small model, on whatever hardware."""
        return self.system.small or self.system.platform == "cpu"

    @property
    def data_parallel_size(self) -> int:
        s, p = self.system, self.parallel
        return schedule.data_parallel_size(s.nodes, s.gpus_per_node, p.tp, p.pp, p.cp)

    @property
    def validation_data_parallel_size(self) -> int:
        """Ranks that evaluate rows of their own."""
        return self.data_parallel_size * self.parallel.cp // self.parallel.evaluation_cp

    @property
    def global_batch_size(self) -> int:
        return self.batch.minibs * self.data_parallel_size

    @property
    def weights_dtype(self) -> str:
        """What training holds the base weights in, by safetensors' names; a checkpoint must have the same."""
        return "F32" if self.system.platform == "cpu" else "BF16"

    @property
    def eval_every_steps(self) -> int:
        return schedule.eval_every_steps(self.global_batch_size, self.evaluation.every_sequences)

    @property
    def eval_steps(self) -> range:
        e = self.evaluation
        return schedule.eval_steps(self.global_batch_size, self.optimization.max_steps, e.every_sequences, e.skip)


GROUPS: dict[str, type] = get_type_hints(Settings)  # by attribute, in reading order
FIELDS: dict[str, tuple[str, Field[Any]]] = {  # by variable: the group's attribute, the field
    f.metadata["variable"]: (name, f) for name, group in GROUPS.items() for f in fields(group)
}


def variables() -> frozenset[str]:
    """Names of all environment variables that this module reads."""
    return frozenset(FIELDS)
