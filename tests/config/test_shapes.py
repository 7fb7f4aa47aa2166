"""Settings against the model: what must divide what."""

from __future__ import annotations

from dataclasses import replace

import pytest

from helpers.environments import VALID
from llama2_lora.config.settings import Settings
from llama2_lora.config.shapes import shape_conflicts
from llama2_lora.llama2 import LLAMA2_70B

TINY = replace(LLAMA2_70B, layers=2, hidden=32, ffn=48, heads=4, kv_groups=2, vocab=64)
CPU = {"PLATFORM": "cpu", "MAX_SEQLEN": "32"}


def conflicts(shape=LLAMA2_70B, **changes: str) -> list[str]:
    return list(shape_conflicts(Settings.from_env(VALID | changes), shape))


def test_shipped_layouts_suit_the_model() -> None:
    assert conflicts() == []
    assert conflicts(FP8="1", SP="1") == []
    assert conflicts(TINY, **CPU, TP="2", SP="1") == []


WIDE = {"DGXNGPU": "16", "DGXSYSTEM": "X_1x16x4", "TP": "16"}
MXFP8 = {**CPU, "TP": "1", "FP8": "1", "FP8_RECIPE": "mxfp8"}
SHORT = {**CPU, "TP": "1", "CP": "8", "FP8": "1", "MBS": "2"}


@pytest.mark.parametrize(
    ("shape", "changes", "starts"),
    [
        (LLAMA2_70B, WIDE, "TP=16: must divide the model's 8 key/value groups"),
        (TINY, {**CPU, "TP": "4"}, "TP=4: must divide the model's 2 key/value groups"),
        (TINY, {**CPU, "TP": "2", "LORA_RANK": "3"}, "TP=2: must divide LORA_RANK=3"),
        (TINY, {**CPU, "TP": "1", "PP": "4"}, "PP=4: must divide the model's 2 layers"),
        (TINY, {**CPU, "TP": "2", "FP8": "1"}, "FP8=1: needs multiples of 16; the FFN columns are 24 on each of TP=2 ranks"),
        (TINY, MXFP8, "FP8=1: needs multiples of 32; the FFN columns are 48"),
        (
            replace(TINY, ffn=64),
            {**CPU, "MAX_SEQLEN": "256", "TP": "2", "SP": "1", "FP8": "1", "FP8_RECIPE": "blockwise"},
            "FP8_RECIPE=blockwise: needs a hidden size in multiples of 128 with SP=1, not 32",
        ),
        (TINY, SHORT, "FP8=1: needs multiples of 8 tokens; a micro-batch of VAL_MBS=1 has 4"),
        (TINY, {**CPU, "TP": "1", "CP": "4", "CP_COMM": "a2a"}, "CP_COMM=a2a: CP=4 must divide the 2 key/value groups"),
        (LLAMA2_70B, {"CPU_OFFLOAD_LAYERS": "80"}, "CPU_OFFLOAD_LAYERS=80: must be below the model's 80 layers"),
    ],
)
def test_named(shape, changes: dict[str, str], starts: str) -> None:
    found = conflicts(shape, **changes)
    assert len(found) == 1, found
    assert found[0].startswith(starts)


def test_three_heads_divide_nothing() -> None:
    names = conflicts(DGXNGPU="6", DGXSYSTEM="X_1x6x4", TP="3")
    assert len([text for text in names if text.startswith("TP=3: must divide")]) == 5  # heads, groups, FFN, vocabulary, rank
