"""The account of memory: known sizes worked by hand, what is known to have trained, and what cannot."""

from __future__ import annotations

import pytest

from llama2_lora.config.settings import Settings
from llama2_lora.forecast.memory import Memory, Software, layer_activations, memory_per_gpu, restore_bytes, what_would_fit
from llama2_lora.gpus import ACCELERATORS, accelerator_of
from llama2_lora.llama2 import LLAMA2_70B

FP8 = {"FP8": "1", "FP8_PARAMS": "1"}
H100_TP4 = {"TP": "4", "SP": "1", "TP_COMM_OVERLAP": "1", **FP8}


def settings(nodes: int, gpus: int, minibs: int, **variables: str) -> Settings:
    required = {"DGXNNODES": str(nodes), "DGXNGPU": str(gpus), "MINIBS": str(minibs), "LR": "4e-4", "MAX_STEPS": "800"}
    return Settings.from_env({"DGXSYSTEM": f"T_{nodes}x{gpus}x{minibs}"} | required | variables)


def account(part: str, nodes: int, gpus: int, minibs: int, **variables: str) -> Memory:
    return memory_per_gpu(settings(nodes, gpus, minibs, **variables), LLAMA2_70B, ACCELERATORS[part])


def gigabytes(memory: Memory, word: str) -> float:
    return sum(item.bytes for item in memory.items if word in item.name) / 1e9


# 68.977e9 parameters: 68,451,041,280 in linear layers, 524,288,000 in embedding and output layer, 1,318,912 in norms.
@pytest.mark.parametrize(
    ("variables", "weights_gb"),
    [
        ({}, 34.5),  # bf16: 137.95 / 4
        ({"FP8": "1"}, 68.7),  # and FP8 copies and transposes, 17.1 each
        (FP8, 34.5),  # 1 + 1 bytes in place of 2
        ({"FP8": "1", "FP8_RECIPE": "mxfp8", "FP8_PARAMS": "1"}, 35.6),  # 33/32 byte in each direction
    ],
)
def test_weights_of_a_quarter_of_the_model(variables: dict[str, str], weights_gb: float) -> None:
    found = account("H100", 1, 8, 4, TP="4", **variables)
    weights = [i for i in found.items if "weights" in i.name or "FP8" in i.name or "embedding" in i.name]
    assert sum(item.bytes for item in weights) / 1e9 == pytest.approx(weights_gb, abs=0.1)


def test_blackwell_needs_no_transposes_and_fp4_keeps_bf16() -> None:
    assert gigabytes(account("B200", 1, 8, 1, **FP8), "transposes") == 0
    fp4 = account("B200", 1, 8, 2, CP="2", FP4="1")
    assert gigabytes(fp4, "linear weights (bf16)") == pytest.approx(136.9, abs=0.1)
    assert gigabytes(fp4, "FP4 copies") == pytest.approx(68.451 * 2 * (1 / 2 + 1 / 16), abs=0.1)


def test_userbuffers_are_twelve_of_which_eight_are_used() -> None:
    """TP 4 on 8,192 x 8,192 = 67.109e6 elements. Gathers: 4 used, 2 not, FP8 or bf16. bf16: 2 pipelined, 2 rings of 7 pieces
    for 4, 2 unused."""
    element = 67.108864e-3
    fp8, bf16 = (account("H100", 1, 8, 4, **(H100_TP4 | {"FP8": on, "FP8_PARAMS": on})) for on in ("1", "0"))
    assert gigabytes(fp8, "userbuffers") == pytest.approx((6 * 1 + 2 * (2 + 2 * 7 / 4 + 2)) * element, rel=1e-6)
    assert gigabytes(bf16, "userbuffers") == pytest.approx((6 * 2 + 2 * (2 + 2 * 7 / 4 + 2)) * element, rel=1e-6)
    assert gigabytes(account("H100", 1, 8, 4, **(H100_TP4 | {"TP_COMM_OVERLAP": "0"})), "userbuffers") == 0


def test_transformer_engines_cross_entropy_keeps_the_logits_alone() -> None:
    """8,192 tokens x 32,000 words = 262.144e6: 12 bytes by Megatron's, 2 where the gradient overwrites the logits."""
    native, te = (account("B200", 1, 8, 1, **FP8, CROSS_ENTROPY=name) for name in ("native", "te"))
    assert gigabytes(native, "logits") == pytest.approx(12 * 0.262144)
    assert gigabytes(te, "logits") == pytest.approx(2 * 0.262144)
    assert te.total < native.total


def test_layers_in_bf16_have_no_copies() -> None:
    """A layer has 8192 * (10,240 + 8,192 + 3 * 28,672) = 855,638,016 linear weights; 3 of 80 layers stay bf16."""
    some = {"BF16_FIRST_LAYERS": "2", "BF16_LAST_LAYERS": "1"}
    a_layer = 0.855638016
    fp8 = account("B200", 1, 8, 2, CP="2", FP8="1", FP8_RECIPE="tensorwise", **some)
    assert gigabytes(fp8, "linear weights (bf16)") == pytest.approx(2 * 80 * a_layer)
    assert gigabytes(fp8, "FP8 copies") == pytest.approx(77 * a_layer)
    fp4 = account("B200", 1, 8, 2, CP="2", FP4="1", **some)
    assert gigabytes(fp4, "FP4 copies") == pytest.approx(77 * a_layer * 2 * (1 / 2 + 1 / 16))
    stages = account("B200", 1, 8, 2, PP="2", CP="2", FP8="1", FP8_RECIPE="tensorwise", **some)
    assert gigabytes(stages, "FP8 copies") == pytest.approx(38 * a_layer)  # the first of two has 40 layers, 2 of them bf16


def test_adapter_and_its_sharded_optimizer_state() -> None:
    found = account("H100", 8, 8, 2, TP="4", CP="2", SP="1", **FP8)
    # 80 * 16 * (8192 + 8192 whole + (10240 + 8192) / TP 4) = 26,869,760 a GPU
    assert gigabytes(found, "adapter (bf16)") == pytest.approx(2 * 26.870e-3, rel=1e-3)
    assert gigabytes(found, "gradients") == pytest.approx(2 * 26.870e-3, rel=1e-3)
    assert gigabytes(found, "AdamW") == pytest.approx(12 * 26.870e-3 / 16, rel=1e-3)  # DP 8 x CP 2 shards


def test_what_graphs_keep() -> None:
    """Masks of both adapters' inputs, [8192, 8192] bytes each and layer; and beside an iteration's graph evaluation's own."""
    warm = {"WARMUP_TRAIN_STEPS": "2", "WARMUP_VALIDATION_STEPS": "2"}
    none, layer, iteration = (account("B200", 1, 8, 1, **FP8, **warm, CUDA_GRAPHS=g) for g in ("none", "layer", "iteration"))
    for graphs in (layer, iteration):
        masks = gigabytes(graphs, "activations: adapter") - gigabytes(none, "activations: adapter")
        assert masks == pytest.approx(80 * 2 * 8192**2 / 1e9)
    logits, working = gigabytes(none, "logits"), gigabytes(none, "working set")
    extra = [gigabytes(account, "evaluation") for account in (none, layer, iteration)]
    assert extra == pytest.approx([0, working, logits + working])


def test_healed_layers_are_warmed_up_beside_graphs() -> None:
    """Two FP8 layers: 68.451e9 / 80 = 0.8556 GB of weights each, and 1/80 of a step's activations."""
    run = {"WARMUP_TRAIN_STEPS": "2", "FP4": "1", "FP4_PARAMS": "1", "FP4_HEAL_STEP": "350", "CUDA_GRAPHS": "layer"}
    healed = account("B200", 1, 8, 1, **run)
    expected = 2 * (68.451 / 80 + gigabytes(healed, "activations") / 80)
    assert gigabytes(healed, "warm-up of the healed") == pytest.approx(expected, rel=1e-4)
    for without in ("CUDA_GRAPHS", "FP4_HEAL_STEP"):
        assert gigabytes(account("B200", 1, 8, 1, **(run | {without: ""})), "warm-up of the healed") == 0


def test_activations_of_one_layer_by_hand() -> None:
    """TP4 SP on 8,192 tokens; tokens * hidden = 67.1e6, a quarter of it 16.8e6; tokens * FFN = 234.9e6."""
    s = settings(1, 8, 4, **H100_TP4)
    megabytes = {item.name: item.bytes / 1e6 for item in layer_activations(s, LLAMA2_70B, Software())}
    assert megabytes == pytest.approx(
        {
            "inputs of both norms": 2 * 2 * 16.777,
            "query, key, value": 2 * 8192 * 10240 / 4 / 1e6,
            "attention output": 2 * 16.777 + 4 * 8192 * 64 / 4 / 1e6,
            "adapter": (2 * 16 * 8192 * (1 + 2 / 4) + 4 * 8192 / 4) / 1e6,  # nothing of the width 8192
            "SwiGLU input": 2 * 2 * 234.881 / 4,
        },
        rel=1e-3,
    )


def test_what_shrinks_the_activations() -> None:
    def activations(**variables: str) -> float:
        found = account("H100", 1, 8, 4, **(H100_TP4 | variables))
        return gigabytes(found, "activations") + gigabytes(found, "recompu")

    plain = activations()
    # query, key, value and output halve; the adapter then keeps linear_proj's bf16 input itself
    assert activations(FP8_DPA="1") == pytest.approx(plain - 80 * ((41.9 + 33.55) / 2 - 33.55) / 1e3, rel=1e-2)
    assert activations(RECOMPUTE="full") < plain / 9
    assert activations(RECOMPUTE="full") < activations(RECOMPUTE="selective") < plain
    assert activations(CPU_OFFLOAD_LAYERS="40") < 0.6 * plain
    assert activations(CP="2", MINIBS="8", DGXSYSTEM="T_1x8x8") == pytest.approx(plain / 2, rel=1e-6)
    assert activations(PP="2", MINIBS="8", DGXSYSTEM="T_1x8x8") == pytest.approx(plain)  # half the layers, two in flight
    assert activations(SP="0", TP_COMM_OVERLAP="0") > 1.2 * plain


def test_evaluation_counts_where_it_needs_more_than_a_step() -> None:
    assert gigabytes(account("B200", 1, 8, 1, **FP8), "evaluation") == 0
    step, many = account("B200", 1, 8, 1, **FP8), account("B200", 1, 8, 1, **FP8, VAL_MBS="64")
    a_row = 8192 * (12 * 32_000 + 8 * 28_672 + 8 * 8192) / 1e9  # logits; fc1 twice in bf16, two halves; four of width h
    used = sum(gigabytes(step, word) for word in ("activations", "logits", "working set"))
    assert gigabytes(many, "evaluation") == pytest.approx(64 * a_row - used, rel=1e-6)
    assert many.total > step.total
    cut, whole = (account("H200", 1, 8, 2, CP="2", VAL_MBS="64", VAL_CP=cp, **FP8) for cp in ("2", "1"))
    half = 32 * a_row  # of 64 rows
    assert gigabytes(whole, "evaluation") - gigabytes(cut, "evaluation") == pytest.approx(half, rel=1e-6)


def test_restoring_needs_one_layer_above_the_weights() -> None:
    """All layers at once would be 68 GB a GPU at TP 4; one layer has 8192 * (10,240 + 8,192 + 3 * 28,672) weights."""
    a_layer = 2 * 8192 * (10_240 + 8_192 + 3 * 28_672) / 4
    fp8 = settings(1, 8, 4, TP="4", SP="1", FP8="1", FP8_PARAMS="1")
    assert restore_bytes(fp8, LLAMA2_70B) == 2 * a_layer
    assert restore_bytes(settings(1, 8, 4, TP="4", SP="1"), LLAMA2_70B) == a_layer
    assert gigabytes(account("H100", 1, 8, 4, TP="4", SP="1", FP8="1", FP8_PARAMS="1"), "restoring") == 0  # a step needs more


# Each of them trained in a published round. The account with the software of this project may be larger.
@pytest.mark.parametrize(
    ("part", "nodes", "gpus", "minibs", "variables"),
    [
        ("H100", 1, 8, 4, H100_TP4),
        ("H100", 1, 4, 8, H100_TP4),
        ("H100", 8, 8, 1, {**H100_TP4, "CP": "2"}),
        ("H200", 1, 8, 2, {"CP": "2", **FP8}),
        ("H200", 1, 8, 2, {"TP": "2", "SP": "1", **FP8}),
        ("B200", 1, 8, 1, FP8),
        ("B200", 1, 8, 2, {"CP": "2", "FP4": "1"}),
        ("B200", 1, 8, 1, {"FP4": "1"}),
        ("GB200", 18, 4, 1, {"CP": "8", **FP8}),
        ("GB300", 2, 4, 1, FP8),
        ("MI300X", 1, 8, 1, FP8),
    ],
)
def test_what_trained_fits(part: str, nodes: int, gpus: int, minibs: int, variables: dict[str, str]) -> None:
    found = account(part, nodes, gpus, minibs, **variables)
    assert found.least < found.capacity
    assert found.verdict != "no"


@pytest.mark.parametrize("config", ["shipped 1x8", "shipped 8x8"])
def test_shipped_configs_fit_with_this_software(config: str) -> None:
    variables = {**H100_TP4, "FP8_DPA": "1"}
    found = account("H100", 1, 8, 4, **variables) if "1x8" in config else account("H100", 8, 8, 2, CP="2", **variables)
    assert found.verdict in ("fits", "tight")


@pytest.mark.parametrize(
    ("part", "gpus", "variables"),
    [
        ("H100", 8, {}),  # TP1 CP1 in bf16: 138 GB of weights
        ("H100", 2, {}),  # the unsharded model on two
        ("H100", 8, {"RECOMPUTE": "full"}),
        ("H100", 8, FP8),
        ("H200", 8, {"CP": "2", "FP8": "1"}),  # FP8 beside bf16: 274 GB
    ],
)
def test_what_cannot_fit(part: str, gpus: int, variables: dict[str, str]) -> None:
    assert account(part, 1, gpus, 2, **variables).verdict == "no"


def test_advice_fits() -> None:
    s = settings(1, 8, 1, **FP8)
    assert account("B200", 1, 8, 1, **FP8).verdict == "over"
    name, value = what_would_fit(s, LLAMA2_70B, ACCELERATORS["B200"]).split("=")
    assert account("B200", 1, 8, 1, **FP8, **{name: value}).verdict in ("fits", "tight")
    assert what_would_fit(settings(1, 8, 2), LLAMA2_70B, ACCELERATORS["H100"]) is None


@pytest.mark.parametrize(
    ("variables", "part"),
    [
        ({"ACCELERATOR": "H200"}, "H200"),
        ({"DGXSYSTEM": "DGXH100_1x8x4"}, "H100"),
        ({"DGXSYSTEM": "tyche_GB200_1x8x4"}, "GB200"),  # and not B200
        ({"DGXSYSTEM": "XE9680_1x8x4"}, None),
        ({"ACCELERATOR": "CPU"}, None),
    ],
)
def test_part_by_name(variables: dict[str, str], part: str | None) -> None:
    system = settings(1, 8, 4, **variables).system
    found = accelerator_of(system.accelerator, system.name)
    assert (found.name if found else None) == part


def test_parts_have_the_memory_they_are_sold_with() -> None:
    for part in ACCELERATORS.values():
        assert 0.96 * part.part_gb < part.memory_bytes / 1e9 < 1.08 * part.part_gb, part.name
