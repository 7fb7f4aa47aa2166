"""Thousands of random environments: no traceback, nothing hidden behind another problem, no line that a value could fake.

ENVIRONMENTS=20000 scripts/test.sh tests/config/test_random_environments.py     more of them; SEED_OF_TEST=7 others
"""

from __future__ import annotations

import os
import random

import pytest

from helpers.environments import VALID
from llama2_lora.config.settings import FIELDS, GROUPS, Settings, SettingsError
from llama2_lora.config.values import parse_group, type_name
from llama2_lora.findings import Finding
from llama2_lora.forecast.plan import plan
from llama2_lora.llama2 import LLAMA2_70B

COUNT = int(os.environ.get("ENVIRONMENTS", "3000"))
SEED = int(os.environ.get("SEED_OF_TEST", "1"))
HOSTILE = (
    "",
    " ",
    "x",
    "-1",
    "nan",
    "inf",
    "1e400",
    "9" * 400,
    "1\n:::MLLOG {}",
    "\x1b[2J",
    "é",
    "\udcff",
    "$(id)",
    "0x10",
    "1.5",
    "٣",
)
NUMBERS = ("0", "1", "2", "3", "4", "5", "6", "7", "8", "16", "32", "64", "72", "80", "128", "8192", "1000000000")
PLAUSIBLE = {
    "DGXNNODES": ("1", "2", "8", "18", "128"),
    "DGXNGPU": ("4", "8"),
    "MINIBS": ("1", "2", "4"),
    "MBS": ("1",),
    "VAL_MBS": ("1", "8"),
    "VAL_CP": ("1", "2"),
    "CP_COMM": ("a2a", "all_gather"),
    "TP": ("1", "2", "4", "8"),
    "PP": ("1", "2"),
    "CP": ("1", "2", "8"),
    "SP": ("0", "1"),
    "LR": ("4e-4", "0", "5"),
    "MAX_STEPS": ("800", "1024", "10"),
    "WALLTIME": ("600", "8:00:00", "0", "9" * 400),
    "LORA_RANK": ("16",),
    "CPU_OFFLOAD_LAYERS": ("0", "0", "20", "80"),
    "ACCELERATOR": ("", "H100", "B200", "GB300", "MI300X", "CPU"),
}


def environment(rng: random.Random) -> dict[str, str]:
    """A legal one with some plausible, some wrong and some hostile values."""
    env = dict(VALID)
    for variable, values in PLAUSIBLE.items():
        if rng.random() < 0.5:
            env[variable] = rng.choice(values)
    for variable in rng.sample(sorted(FIELDS), rng.choice((0, 1, 3))):
        env[variable] = some_value(rng, variable)
    if rng.random() < 0.8:  # else the name contradicts the shape
        env["DGXSYSTEM"] = f"{rng.choice(('DGXH100', 'GB200', 'SITE'))}_" + "x".join(
            env[n] for n in ("DGXNNODES", "DGXNGPU", "MINIBS")
        )
    return {name: value for name, value in env.items() if rng.random() > 0.01}


def some_value(rng: random.Random, variable: str) -> str:
    _, f = FIELDS[variable]
    legal = (*f.metadata["choices"], "0", "1") if type_name(f) in ("bool", "str") else NUMBERS
    return rng.choice(HOSTILE if rng.random() < 0.4 else legal)


def problems(env: dict[str, str]) -> list[str]:
    try:
        Settings.from_env(env)
    except SettingsError as error:
        return str(error).splitlines()
    return []


@pytest.fixture(scope="module")
def environments() -> list[dict[str, str]]:
    rng = random.Random(SEED)
    return [environment(rng) for _ in range(COUNT)]


def test_every_environment_is_a_plan_or_a_list_of_printable_problems(environments: list[dict[str, str]]) -> None:
    plans = 0
    for env in environments:
        found = problems(env)
        assert all(text.isprintable() and len(text) < 600 for text in found), (env, found)
        assert len(set(found)) == len(found), found
        if not found:
            plans += 1
            assert all(
                isinstance(finding, Finding) and str(finding).isprintable() for finding in plan(Settings.from_env(env)).findings
            )
    assert COUNT > plans > COUNT / 100, f"{plans} of {COUNT} environments are legal: the test has lost its sense"


def test_no_contradiction_hides_behind_an_illegal_value(environments: list[dict[str, str]]) -> None:
    """A contradiction that is there whatever legal value stands in for the illegal one must be named beside it."""
    compared = 0
    for env in environments:
        found = problems(env)
        unparsed = [name for name in env if env[name] != "" and unreadable(name, env[name])]
        if not unparsed:
            continue
        mended = [problems(env | dict(zip(unparsed, stand_ins, strict=True))) for stand_ins in choices(unparsed)]
        always = set.intersection(*map(set, mended))
        assert always <= set(found), (env, always - set(found))
        compared += bool(always)
    assert compared > COUNT / 100


def unreadable(variable: str, text: str) -> bool:
    """Whether the field's own parser, choices or bounds refuse the text."""
    group, _ = FIELDS[variable]
    wrong: list[str] = []
    parse_group(GROUPS[group], {variable: text}, wrong)
    return any(problem.startswith(f"{variable}=") for problem in wrong)


def choices(variables: list[str]) -> list[list[str]]:
    """Two lists of legal values for these variables that differ wherever a field has two."""
    first, second = [], []
    for variable in variables:
        _, f = FIELDS[variable]
        texts = ("", "A_1x8x4") if f.default == "" else ("A_1x8x4", "B_7x7x7")
        low, words = f.metadata["low"] or 0, f.metadata["choices"] or texts
        pair = {
            "bool": ("0", "1"),
            "int": (str(int(low) or 1), str(min(f.metadata["high"] or 50_000, 50_000))),
            "float": ("0.3", "0.4"),
            "str": (words[0], words[-1]),
        }[type_name(f)]
        first.append(pair[0])
        second.append(pair[1])
    return [first, second]


def test_a_go_is_possible(environments: list[dict[str, str]]) -> None:
    """What preflight lets pass divides as Megatron and Transformer Engine ask; these conditions are written out anew."""
    goes = 0
    for env in environments:
        if problems(env) or not (found := plan(Settings.from_env(env))).go or found.rehearsal:
            continue
        if env.get("REHEARSAL", "") in ("1", "true", "yes", "on"):
            continue  # a small model, whatever the shape of the 70B
        goes += 1
        s, shape = Settings.from_env(env), LLAMA2_70B
        p = s.parallel
        remainders = (shape.heads % p.tp, shape.kv_groups % p.tp, shape.layers % p.pp, s.optimization.lora_rank % p.tp)
        assert not any(remainders), env
        assert s.performance.offload_layers < shape.layers, env
        assert s.optimization.lr > 0, env
        assert s.optimization.lora_dropout < 1, env
        assert found.evaluation.steps, env
        enough = found.memory is None or found.memory.least <= found.memory.capacity
        assert enough or s.system.memory_check == "warn", env
        assert not (s.precision.fp4 and found.accelerator in ("H100", "H200", "MI300X")), env
        assert found.forecast is None or found.forecast.walltime_minutes >= found.forecast.run_minutes.low, env
    assert goes > COUNT / 1000


@pytest.mark.parametrize("variable", sorted(FIELDS))
def test_a_line_break_in_a_value_cannot_fake_a_line(variable: str) -> None:
    found = problems(VALID | {variable: "1\n:::MLLOG fake\rmore"})
    assert found
    assert all(text.isprintable() for text in found)
    assert not any(text.startswith(":::MLLOG") for text in found)
