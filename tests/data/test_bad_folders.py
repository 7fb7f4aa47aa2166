"""Folders that are not the data set, and the stage at which each one is found.

run.sub's probe and preflight look at every byte before any GPU works, so they find all of them. train.py by itself, which may
look at metadata alone until run_start, finds what it can: before the start, when it opens both files, or at the first row.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers import ROOT
from helpers.training_runs import SEQUENCE, TRAIN_ROWS, VALIDATION_ROWS, VOCAB, make_data
from llama2_lora.data import inspection, packed
from llama2_lora.data.rows import OpenSplit

STAGES = ("metadata", "open", "row", "probe only")
Damage = Callable[[Path], Any]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    make_data(folder)
    return folder


def manifest(**changes: Any) -> Damage:
    """Change entries of the manifest; `validation_rows` and the like those of a file."""

    def damage(folder: Path) -> None:
        path = folder / packed.MANIFEST
        content = json.loads(path.read_text())
        for name, value in changes.items():
            split, _, key = name.partition("_")
            if split in ("train", "validation"):
                content["files"][f"{split}.npy"][key] = value
            else:
                content[name] = value
        path.write_text(json.dumps(content))

    return damage


def rewritten(split: str, change: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]) -> Damage:
    """Other rows, and a manifest that agrees with them: nothing but the rows themselves is wrong."""

    def damage(folder: Path) -> None:
        records = np.load(folder / f"{split}.npy")
        ids, mask = change(records["input_ids"].copy(), records["loss_mask"].copy())
        packed.write_split(folder / f"{split}.npy", ids, mask)
        packed.write_manifest(folder, ids.shape[1], VOCAB, "tests", "none")

    return damage


def training_rows(masks_too: bool) -> Damage:
    def damage(folder: Path) -> None:
        train, validation = np.load(folder / "train.npy"), np.load(folder / "validation.npy")
        mask = (train if masks_too else validation)["loss_mask"][:VALIDATION_ROWS]
        packed.write_split(folder / "validation.npy", train["input_ids"][:VALIDATION_ROWS], mask)
        packed.write_manifest(folder, SEQUENCE, VOCAB, "tests", "none")

    return damage


def shorter(folder: Path) -> None:
    for name in packed.SPLITS:
        packed.write_split(folder / name, (ids := np.load(folder / name)["input_ids"][:, :16]), np.ones_like(ids))
    packed.write_manifest(folder, 16, VOCAB, "tests", "none")


def swap(folder: Path) -> None:
    (folder / "train.npy").rename(folder / "x")
    (folder / "validation.npy").rename(folder / "train.npy")
    (folder / "x").rename(folder / "validation.npy")


def is_a_folder(folder: Path, name: str) -> None:
    (folder / name).unlink()
    (folder / name).mkdir()


def dangling(folder: Path) -> None:
    (folder / "train.npy").unlink()
    (folder / "train.npy").symlink_to("/nowhere/train.npy")


def same_size(name: str, start: bytes) -> Damage:
    """Another beginning; size and manifest's size stay."""
    return lambda folder: (folder / name).write_bytes(start + (folder / name).read_bytes()[len(start) :])


def flip(name: str, offset: int) -> Damage:
    def damage(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        content[offset] ^= 1
        (folder / name).write_bytes(content)

    return damage


def pickled(folder: Path) -> None:
    """As NVIDIA's script leaves it."""
    for name in packed.SPLITS:
        np.save(folder / name, np.array([{"input_ids": [1] * SEQUENCE}] * 3, dtype=object), allow_pickle=True)
    (folder / packed.MANIFEST).unlink()


def without_manifest(damage: Damage) -> Damage:
    return lambda folder: (damage(folder), (folder / packed.MANIFEST).unlink())


def text(name: str, content: str) -> Damage:
    return lambda folder: (folder / name).write_text(content)


def cut(name: str, count: int) -> Damage:
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size - count)


def set_value(field: str, value: int) -> Callable:
    def change(ids: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        (ids if field == "ids" else mask)[2 if value else slice(2, 3), ...] = value
        return ids, mask

    return change


NPY = b"\x93NUMPY\x01\x00"
# Folder's fault, how it is made, where train.py by itself finds it, what it says of it.
BAD: list[tuple[str, Damage, str, str]] = [
    ("no train.npy", lambda f: (f / "train.npy").unlink(), "metadata", "train.npy does not exist"),
    ("no validation.npy", lambda f: (f / "validation.npy").unlink(), "metadata", "validation.npy does not exist"),
    ("train.npy is a folder", lambda f: is_a_folder(f, "train.npy"), "metadata", "does not exist or is no file"),
    ("validation.npy is a folder", lambda f: is_a_folder(f, "validation.npy"), "metadata", "does not exist or is no file"),
    ("a link to nowhere", dangling, "metadata", "train.npy does not exist"),
    ("train.npy is empty", text("train.npy", ""), "metadata", "has 0 bytes, the manifest says"),
    ("validation.npy is empty", text("validation.npy", ""), "metadata", "has 0 bytes, the manifest says"),
    ("a text file", text("train.npy", "hello"), "metadata", "has 5 bytes, the manifest says"),
    ("train.npy lacks a byte", cut("train.npy", 1), "metadata", "the manifest says"),
    ("train.npy lacks a row", cut("train.npy", 3 * SEQUENCE), "metadata", "the manifest says"),
    ("validation.npy lacks a byte", cut("validation.npy", 1), "metadata", "the manifest says"),
    ("the two files swapped", swap, "metadata", "the manifest says"),
    ("the pickles of NVIDIA's script", pickled, "open", "holds pickled objects"),
    ("train.npy starts with zeros", same_size("train.npy", bytes(200)), "open", "is not a .npy file"),
    ("a parquet file", same_size("validation.npy", b"PAR1"), "open", "is not a .npy file"),
    ("a header that ends early", same_size("train.npy", NPY + b"\x10\x00"), "open", "is not a .npy file"),
    ("a header of 60 KB", same_size("validation.npy", NPY + b"\xff\xff"), "open", "is not a .npy file"),
    (
        "another count in the header",
        lambda f: (f / "train.npy").write_bytes((f / "train.npy").read_bytes().replace(b"(40,)", b"(39,)")),
        "open",
        "its header promises",
    ),
    (
        "numbers of 8 bytes",
        without_manifest(lambda f: np.save(f / "train.npy", np.zeros((40, SEQUENCE), np.int64))),
        "open",
        "rows of int64",
    ),
    ("rows of another length", shorter, "metadata", "no file of 40 rows of 32 tokens (MAX_SEQLEN)"),
    ("one byte of train.npy changed", flip("train.npy", -2 - SEQUENCE), "probe only", "has sha256"),
    ("one byte of validation.npy changed", flip("validation.npy", -2 - SEQUENCE), "open", "has sha256"),
    ("ids outside the vocabulary", rewritten("train", set_value("ids", 700)), "row", "token id 700"),
    ("ids outside it, validation", rewritten("validation", set_value("ids", 700)), "open", "token id 700"),
    ("a mask of 2", rewritten("train", set_value("mask", 2)), "row", "loss_mask has the value 2"),
    ("a row that scores nothing", rewritten("train", set_value("mask", 0)), "row", "row 2 scores no token"),
    ("a row that scores nothing, validation", rewritten("validation", set_value("mask", 0)), "open", "row 2 scores no token"),
    ("training rows and masks as validation", training_rows(True), "open", "training rows"),
    ("training rows as validation", training_rows(False), "probe only", "13 rows are training rows, such as row 0"),
    ("0 rows in the manifest", manifest(train_rows=0), "metadata", "has 0 rows"),
    ("3 rows in the manifest", manifest(validation_rows=3), "metadata", "no file of 3 rows"),
    ("10^9 rows in the manifest", manifest(validation_rows=10**9), "metadata", "no file of 1000000000 rows"),
    ("10^30 rows in the manifest", manifest(train_rows=10**30), "metadata", "manifest.json is damaged"),
    ("-40 rows in the manifest", manifest(train_rows=-40), "metadata", "manifest.json is damaged"),
    ("40.0 rows in the manifest", manifest(train_rows=40.0), "metadata", "manifest.json is damaged"),
    ("true rows in the manifest", manifest(validation_rows=True), "metadata", "manifest.json is damaged"),
    ("no hash in the manifest", manifest(validation_sha256=None), "metadata", "manifest.json is damaged"),
    ("another hash in the manifest", manifest(validation_sha256="0" * 64), "open", "has sha256"),
    ("another row length in the manifest", manifest(sequence_length=64), "metadata", "MAX_SEQLEN"),
    ("another tokenizer", manifest(vocab_size=32_000), "metadata", "another tokenizer"),
    ("a manifest that lists one file", manifest(files={}), "metadata", "does not list train.npy"),
    ("a manifest that lists another file", manifest(files={"../x.npy": {}}), "metadata", "manifest.json is damaged"),
    ("half a manifest", text("manifest.json", '{"files": '), "metadata", "manifest.json is damaged"),
    ("a manifest of brackets", text("manifest.json", "[" * 100_000), "metadata", "manifest.json is damaged"),
    ("a manifest that is a list", text("manifest.json", "[]"), "metadata", "manifest.json is damaged"),
]


def stages(folder: Path) -> tuple[str, str]:
    """Where train.py by itself finds a fault, as training/data.py goes about it, and its words."""
    try:
        splits = inspection.expected(folder, SEQUENCE, VOCAB, gpu=False)
    except (ValueError, OSError) as error:
        return "metadata", str(error)
    try:
        opened = inspection.open_splits(folder, splits, SEQUENCE, VOCAB)
    except (ValueError, OSError) as error:
        return "open", str(error)
    try:
        for split in opened.values():
            for row in range(len(split)):
                split[row]
    except ValueError as error:
        return "row", str(error)
    return "probe only", ""


@pytest.mark.parametrize(("damage", "stage", "message"), [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_a_bad_folder(good: Path, tmp_path: Path, damage: Damage, stage: str, message: str) -> None:
    folder = tmp_path / "data"
    shutil.copytree(good, folder)
    damage(folder)
    found, said = stages(folder)
    assert found == stage, said
    assert message in said or stage == "probe only"
    assert "\n" not in said
    probe = inspection.problems(folder, gpu=False, sequence_length=SEQUENCE, vocab_size=VOCAB)
    assert any(message in problem for problem in probe), probe
    assert all("\n" not in problem and str(tmp_path) in problem for problem in probe)


def test_the_good_folder_passes_every_stage(good: Path) -> None:
    assert stages(good) == ("probe only", "")
    assert inspection.problems(good, gpu=False) == []


def test_most_are_found_before_any_gpu_works_by_train_py_too() -> None:
    """What only the probe finds, or the first row: as few as the rules allow (no data before run_start)."""
    count = {stage: sum(case[2] == stage for case in BAD) for stage in STAGES}
    assert count["probe only"] + count["row"] <= 5, count
    assert len(BAD) >= 37


def test_on_gpus_the_rules_fix_the_counts(tmp_path: Path) -> None:
    packed.write_split(tmp_path / "train.npy", np.ones((3, 8192)), np.ones((3, 8192)))
    packed.write_split(tmp_path / "validation.npy", np.ones((173, 8192)), np.ones((173, 8192)))
    packed.write_manifest(tmp_path, 8192, 32_000, "tests", "none")
    with pytest.raises(ValueError, match=r"train\.npy has 3 rows: the rules fix 3901"):
        inspection.expected(tmp_path, 8192, 32_000, gpu=True)
    assert "the rules fix 3901" in inspection.problems(tmp_path, gpu=True)[0]


def test_a_file_that_may_not_be_read() -> None:
    """As another user than root, who may read all."""
    code = (
        "import os, sys; from pathlib import Path; from llama2_lora.data import inspection\n"
        "os.getuid() or os.setresuid(65534, 65534, 65534)\n"
        f"print(*inspection.problems(Path(sys.argv[1]), False, {SEQUENCE}, {VOCAB}))"
    )
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        make_data(Path(name))
        os.chmod(Path(name, "validation.npy"), 0)
        environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
        done = subprocess.run([sys.executable, "-c", code, name], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == f"{name}/validation.npy cannot be read by this user: give it read permission\n"


def test_the_nodes_probe_reads_every_byte(good: Path, tmp_path: Path) -> None:
    """health.py, as run.sub starts it: the job ends before any GPU works, whatever HEALTH says."""
    shutil.copytree(good, tmp_path / "data")
    flip("train.npy", -2 - SEQUENCE)(tmp_path / "data")
    script = [sys.executable, ROOT / "scripts/health.py"]
    paths = ["--data", tmp_path / "data", "--checkpoint", tmp_path, "--results", tmp_path]
    probe = subprocess.run([*script, "probe", "--platform", "cpu", *paths], capture_output=True, text=True, check=True)
    (tmp_path / "probes").write_text(probe.stdout)
    judge = [*script, "judge", tmp_path / "probes", "--platform", "cpu", "--gpus", "1", "--mode", "off"]
    judged = subprocess.run(judge, capture_output=True, text=True)
    assert judged.returncode == 1
    assert "train.npy has sha256" in judged.stdout


def test_a_row_is_one_read_and_the_file_is_not_mapped(good: Path) -> None:
    split = OpenSplit(good / "train.npy", SEQUENCE, VOCAB, TRAIN_ROWS)
    assert split[7].tobytes() == np.load(good / "train.npy")[7].tobytes()
    assert str(good) not in Path("/proc/self/maps").read_text()
