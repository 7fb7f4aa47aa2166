"""download_dataset.py: from the hub, from parquet and from pickles to plain arrays, and every file that it refuses."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from helpers.hub_server import HubServer
from llama2_lora.config import rules
from llama2_lora.data import packed, sources

TRAIN, VALIDATION = "data/train-00000-of-00001.parquet", "data/validation-00000-of-00001.parquet"
S = rules.SEQUENCE_LENGTH


def write_parquet(path: Path, ids_NS: np.ndarray, labels_NS: np.ndarray, dtype: type = np.int32) -> Path:
    starts = pa.array(np.arange(len(ids_NS) + 1, dtype=np.int32) * ids_NS.shape[1])
    columns = {"input_ids": ids_NS, "labels": labels_NS}
    lists = {name: pa.ListArray.from_arrays(starts, pa.array(data.astype(dtype).ravel())) for name, data in columns.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(lists), path, row_group_size=1000)
    return path


def made_up(rows: int, seed: int) -> np.ndarray:
    """Rows that repeat 64 random ids, so that the files of real shape are small."""
    return np.tile(np.random.default_rng(seed).integers(3, 32_000, (rows, 64), dtype=np.int32), S // 64)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of the real shape, as parquet."""
    folder = tmp_path_factory.mktemp("source")
    train, validation = made_up(rules.TRAIN_SEQUENCES, 1), made_up(rules.EVAL_SEQUENCES, 2)
    labels = validation.copy()
    labels[:, :5000] = -100
    write_parquet(folder / TRAIN, train, train)
    write_parquet(folder / VALIDATION, validation, labels)
    return folder


@pytest.fixture
def server(source: Path):
    files = {name: (source / name).read_bytes() for name in (TRAIN, VALIDATION)}
    with HubServer(rules.DATASET_REPOSITORY, files | {"README.md": b"card"}, "dataset") as server:
        server.commit = rules.DATASET_REVISION
        yield server


@pytest.fixture(scope="module")
def converted(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("converted")
    with HubServer("no/hub", {}) as server:
        result = command(server, folder, "--source", source)
    assert result.returncode == 0, result.stderr
    return folder


def command(server: HubServer, folder: Path, *arguments: object, **changes: str) -> subprocess.CompletedProcess[str]:
    return server.run("download_dataset.py", "--data_dir", folder, *arguments, home=folder.parent, **changes)


def assert_is_the_source(folder: Path) -> None:
    train = np.load(folder / "train.npy", mmap_mode="r", allow_pickle=False)
    validation = np.load(folder / "validation.npy", mmap_mode="r", allow_pickle=False)
    assert train["input_ids"].shape == (3901, 8192)
    assert (train["input_ids"] == made_up(3901, 1)).all()
    assert train["loss_mask"].all()
    assert (validation["input_ids"] == made_up(173, 2)).all()
    assert not validation["loss_mask"][:, :5000].any()
    assert validation["loss_mask"][:, 5000:].all()


def test_download_writes_the_two_files_and_a_manifest_and_touches_no_other(server: HubServer, tmp_path: Path) -> None:
    folder = tmp_path / "gov_report"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    server.truncated[TRAIN] = 1
    result = command(server, folder)
    assert result.returncode == 0, result.stderr
    assert_is_the_source(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["manifest.json", "notes.txt", "train.npy", "validation.npy"]
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["source"], manifest["revision"]) == (rules.DATASET_REPOSITORY, rules.DATASET_REVISION)
    assert f"{folder}/train.npy: 3,901 rows of 8,192 tokens, 95.9 MB\n" in result.stdout
    assert f"{folder}/validation.npy: 173 rows of 8,192 tokens, 4.3 MB\n" in result.stdout

    server.sent.clear()
    again = command(server, folder, HF_ENDPOINT="http://127.0.0.1:9")
    assert again.returncode == 0, again.stderr
    assert "verified" in again.stdout
    assert not server.sent

    with (folder / "train.npy").open("r+b") as file:
        file.seek(50_000_000)
        file.write(b"\1\0\1\0")
    damaged = command(server, folder, "--check")
    assert damaged.returncode == 1
    assert f"error: {folder}/train.npy has another hash than manifest.json says" in damaged.stderr
    assert command(server, folder).returncode == 0  # made again
    assert_is_the_source(folder)


def test_kill_in_the_middle_leaves_no_file_and_the_next_call_completes_it(server: HubServer, tmp_path: Path) -> None:
    folder = tmp_path / "gov_report"
    server.pause_at[VALIDATION] = 1
    process = subprocess.Popen(
        server.command("download_dataset.py", "--data_dir", folder), env=server.environment(tmp_path), stderr=subprocess.DEVNULL
    )
    assert server.paused.wait(30)
    deadline = time.monotonic() + 30
    while not (folder / ".download" / TRAIN).exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert {path.name for path in folder.iterdir()} == {".download", ".lock"}
    server.pause_at.clear()
    server.go_on.set()
    server.sent.clear()
    assert command(server, folder).returncode == 0
    assert_is_the_source(folder)
    assert not server.sent[TRAIN]


def test_offline_takes_what_is_in_the_cache(server: HubServer, tmp_path: Path) -> None:
    program = f"snapshot_download({rules.DATASET_REPOSITORY!r}, repo_type='dataset', revision={rules.DATASET_REVISION!r})"
    fill = [sys.executable, "-c", f"from huggingface_hub import snapshot_download; {program}"]
    subprocess.run(fill, env=server.environment(tmp_path), check=True, capture_output=True)
    server.sent.clear()
    result = command(server, tmp_path / "gov_report", HF_HUB_OFFLINE="1")
    assert result.returncode == 0, result.stderr
    assert_is_the_source(tmp_path / "gov_report")
    assert not server.sent


def test_pickles_of_the_other_script_go_out_and_come_back(converted: Path, tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    with HubServer("no/hub", {}) as server:
        result = command(server, converted, "--export-pickle", theirs)
        assert result.returncode == 0, result.stderr
        # Sizes of the files that NVIDIA's script makes of the real data set: they do not depend on the ids.
        assert (theirs / "train.npy").stat().st_size == 192_151_239
        assert (theirs / "validation.npy").stat().st_size == 8_521_136
        sample = np.load(theirs / "validation.npy", allow_pickle=True)[0]
        assert sample["seq_start_id"] == [0]
        assert sample["loss_mask"] == [0] * 5000 + [1] * 3192

        refused = command(server, theirs, "--source", converted)
        assert refused.returncode == 1
        assert f"{theirs}/train.npy was not written by this script and is not replaced" in refused.stderr
        hint = command(server, theirs, "--check")
        assert hint.returncode == 1
        assert "holds pickled objects, which run code when they are loaded" in hint.stderr

        result = command(server, theirs, "--import-pickle")
        assert result.returncode == 0, result.stderr
        assert "warning: " in result.stderr
        assert_is_the_source(theirs)
        assert command(server, theirs, "--check").returncode == 0


class Evil:
    def __reduce__(self) -> tuple:
        return Path.write_text, (Path("/tmp/never"), "code ran")


def test_a_pickle_that_would_run_code_is_not_loaded(tmp_path: Path) -> None:
    np.save(tmp_path / "train.npy", np.array([{"input_ids": Evil(), "loss_mask": [1]}], dtype=object))
    with pytest.raises(ValueError, match=r"asks for .*, which no such file needs: it was not loaded"):
        list(sources.read_pickle(tmp_path / "train.npy", SMALL))


SMALL = sources.Split(rows=3, sequence_length=4, vocab_size=100, all_scored=True)
IDS = np.arange(12).reshape(3, 4) + 3


@pytest.mark.parametrize(
    ("ids", "labels", "message"),
    [
        (IDS[:2], IDS[:2], "2 rows, 3 were expected"),
        (IDS[:, :3], IDS[:, :3], "every row must have 4 tokens"),
        (IDS + 95, IDS + 95, "token id 109: must be below the vocabulary of 100"),
        (-IDS, -IDS, "token id -14: must be below the vocabulary"),
        (IDS, IDS + 1, "labels must be -100 or equal input_ids"),
        (IDS, np.where(IDS == 9, -100, IDS), "row 1: labels differ from input_ids, in the train split every token is scored"),
        (IDS, np.where(IDS > 10, -100, IDS), "row 2 scores no token"),
    ],
)
def test_parquet_that_is_not_the_data_set(tmp_path: Path, ids: np.ndarray, labels: np.ndarray, message: str) -> None:
    path = write_parquet(tmp_path / "train-0.parquet", ids, labels)
    with pytest.raises(ValueError, match=message):
        list(sources.read_parquet([path], SMALL))


def test_a_damaged_parquet_file_is_named(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "train-0.parquet", IDS, IDS)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"train-0\.parquet: .*Parquet"):
        list(sources.read_parquet([path], SMALL))


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_shards_are_read_in_order_whatever_integers_they_hold(tmp_path: Path, dtype: type) -> None:
    paths = [write_parquet(tmp_path / f"train-{i}.parquet", IDS[i : i + 1], IDS[i : i + 1], dtype) for i in range(3)]
    chunks = list(sources.read_parquet(paths, SMALL))
    assert np.concatenate([ids_NS for ids_NS, _ in chunks]).tolist() == IDS.tolist()


def test_pickles_may_hold_lists_or_arrays_of_any_protocol(tmp_path: Path) -> None:
    samples = [{"input_ids": IDS[0].tolist(), "loss_mask": [1] * 4}, {"input_ids": IDS[1], "loss_mask": np.ones(4, bool)}]
    samples.append({"input_ids": [np.int64(i) for i in IDS[2]], "loss_mask": (True,) * 4})
    array = np.array(samples, dtype=object)
    for protocol in range(3, pickle.HIGHEST_PROTOCOL + 1):
        with (tmp_path / "train.npy").open("wb") as file:
            np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
            pickle.dump(array, file, protocol)
        ((ids_NS, mask_NS),) = sources.read_pickle(tmp_path / "train.npy", SMALL)
        assert ids_NS.tolist() == IDS.tolist()
        assert mask_NS.tolist() == [[1] * 4] * 3


@pytest.mark.parametrize(
    "samples",
    [
        [{"input_ids": [3] * 4, "loss_mask": [1] * 4}] * 2,
        [{"input_ids": [3] * 3, "loss_mask": [1] * 3}] * 3,
        [{"input_ids": "x", "loss_mask": "y"}] * 3,
        [{"tokens": [3]}] * 3,
        [[1, 2]] * 3,
    ],
)
def test_pickles_that_are_not_the_data_set(tmp_path: Path, samples: list) -> None:
    array = np.empty(len(samples), dtype=object)
    array[:] = samples
    np.save(tmp_path / "train.npy", array)
    with pytest.raises(ValueError, match=r"train\.npy"):
        list(sources.read_pickle(tmp_path / "train.npy", SMALL))


def test_memory_does_not_grow_with_the_data(source: Path, converted: Path, tmp_path: Path) -> None:
    """All anonymous memory, libraries included, stays below the 244 MiB that ids and labels of the train split take."""
    with HubServer("no/hub", {}) as server:
        limit = ["prlimit", f"--data={240 << 20}"]
        result = subprocess.run(
            [*limit, *server.command("download_dataset.py", "--data_dir", tmp_path / "data", "--source", source)],
            env=server.environment(tmp_path),
            capture_output=True,
            text=True,
        )
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "data/train.npy").read_bytes() == (converted / "train.npy").read_bytes()


def test_what_is_not_there_is_said_in_one_line(server: HubServer, tmp_path: Path) -> None:
    result = command(server, tmp_path / "data", "--source", tmp_path)
    assert result.stderr == f"error: {tmp_path} has no train-*.parquet, nor has its data/\n"
    result = command(server, tmp_path / "data", "--check")
    assert result.stderr.startswith(f"error: {tmp_path}/data/train.npy does not exist: run `python scripts/download_dataset.py")
    assert result.returncode == 1
    assert not (tmp_path / "data").exists()
    server.status[""] = (401, "RepoNotFound")
    result = command(server, tmp_path / "data")
    assert f"dataset {rules.DATASET_REPOSITORY} is missing, private or gated" in result.stderr
    result = command(server, tmp_path / "data", HF_HUB_OFFLINE="1")
    assert "HF_HUB_OFFLINE=1 is set" in result.stderr


def test_rehearsal_data_is_not_replaced(server: HubServer, source: Path, tmp_path: Path) -> None:
    packed.write_split(tmp_path / "train.npy", IDS, np.ones_like(IDS))
    packed.write_manifest(tmp_path, 4, 100, "rehearsal", "1")
    before = (tmp_path / "train.npy").read_bytes()
    assert command(server, tmp_path, "--source", source).returncode == 1
    assert (tmp_path / "train.npy").read_bytes() == before
