"""download_model.py: the tree that it leaves, second calls, split files and what it refuses. Failing downloads: test_hub.py."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from helpers import ROOT
from helpers.hub_server import COMMIT, HubServer
from helpers.training_runs import clean_environment
from llama2_lora.hub import pieces
from llama2_lora.hub.client import RemoteFile

NAME = "someone/llama-nemo"
WHOLE = "weights/module.decoder.layers.mlp.linear_fc1.weight/0.0.0"
DATA = os.urandom(250_000)
PIECES = {f"{WHOLE}.part-{i:02}": DATA[i * 100_000 : (i + 1) * 100_000] for i in range(3)}
FILES = {
    ".gitattributes": b"",
    "context/io.json": b"{}",
    "context/model.yaml": b"a: 1",
    "context/nemo_tokenizer/tokenizer.model": b"t",
    "weights/metadata.json": b"{}",
    "weights/common.pt": b"c",
    "weights/module.decoder.layers.mlp.linear_fc1.weight/0.1.0": b"not a piece",
} | PIECES


@pytest.fixture
def server():
    with HubServer(NAME, dict(FILES)) as server:
        yield server


def fetch(server: HubServer, folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    return server.run("download_model.py", "--model_dir", folder, "--repository", NAME, *more, home=folder.parent)


def tree(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_the_checkpoint_and_nothing_else_is_left_with_split_files_joined(server: HubServer, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    result = fetch(server, folder)
    assert result.returncode == 0, result.stderr
    expected = {*FILES, WHOLE, ".manifest.json"} - {".gitattributes", *PIECES}
    assert tree(folder) == sorted(expected)
    assert (folder / WHOLE).read_bytes() == DATA
    assert f"{NAME} at {COMMIT}: 9 files, 0.0 GB\n" in result.stdout
    assert "complete, every size and hash is the hub's" in result.stdout
    assert not list(tmp_path.glob("hf/hub/*/blobs/*"))  # the cache took no second copy


def test_a_second_call_verifies_and_fetches_nothing(server: HubServer, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    fetch(server, folder)
    server.sent.clear()
    assert fetch(server, folder, "--revision", COMMIT).returncode == 0
    assert not server.sent

    damaged = bytearray(DATA)
    damaged[150_000] ^= 1  # in the second piece of the joined file
    (folder / WHOLE).write_bytes(damaged)
    result = fetch(server, folder)
    assert result.returncode == 1
    assert f"{folder / WHOLE} has another hash than the hub lists for {WHOLE}.part-01" in result.stderr
    assert (folder / WHOLE).read_bytes() == damaged  # it may be somebody's converted checkpoint: not replaced


def test_a_finished_folder_is_verified_without_the_hub(server: HubServer, tmp_path: Path) -> None:
    """Neither a network nor a cache is needed, and a branch that has moved on makes no good folder a bad one."""
    folder = tmp_path / "model"
    assert fetch(server, folder).returncode == 0
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "empty")}
    script = [sys.executable, ROOT / "scripts/download_model.py", "--model_dir", folder, "--repository", NAME]
    done = subprocess.run(script, env=clean_environment(**offline), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (folder / "weights/common.pt").write_bytes(b"d")
    done = subprocess.run(script, env=clean_environment(**offline), capture_output=True, text=True)
    assert done.returncode == 1
    assert "common.pt has another hash" in done.stderr


def test_a_stopped_call_goes_on_with_the_revision_that_it_found(server: HubServer, tmp_path: Path) -> None:
    """The branch moves on in the meantime; the commit is printed as it can be given."""
    folder = tmp_path / "model"
    server.status["weights/common.pt"] = (403, "")
    stopped = fetch(server, folder)
    assert stopped.returncode == 1
    assert f"pin it: --repository {NAME} --revision {COMMIT}\n" in stopped.stdout
    server.status = {"": (500, "")}  # nobody asks what the branch names now
    assert fetch(server, folder).returncode == 0
    assert (folder / "weights/common.pt").read_bytes() == b"c"


def test_two_calls_into_one_folder(server: HubServer, tmp_path: Path) -> None:
    """The second one is told who is there, the first one completes."""
    folder = tmp_path / "model"
    server.pause_at[f"{WHOLE}.part-00"] = 0
    command = server.command("download_model.py", "--model_dir", folder, "--repository", NAME)
    with subprocess.Popen(command, env=server.environment(tmp_path), stderr=subprocess.DEVNULL) as first:
        assert server.paused.wait(30)
        second = fetch(server, folder)
        server.go_on.set()
        assert first.wait(60) == 0
    assert second.returncode == 1
    assert f"error: {folder} is being written by process {first.pid} on " in second.stderr
    assert WHOLE in tree(folder)
    assert not (folder / ".lock").exists()


def test_a_file_that_goes_while_the_others_come_is_missed(server: HubServer, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    slow = "weights/module.decoder.layers.mlp.linear_fc1.weight/0.1.0"
    server.pause_at[slow] = 0
    command = server.command("download_model.py", "--model_dir", folder, "--repository", NAME)
    with subprocess.Popen(command, env=server.environment(tmp_path), stderr=subprocess.PIPE, text=True) as process:
        assert server.paused.wait(30)
        arrived = folder / ".download/weights/common.pt"
        deadline = time.monotonic() + 30
        while not arrived.exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(0.5)  # until it is verified
        arrived.unlink()
        server.go_on.set()
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1
    assert f"{arrived} was changed or removed while the others came: run the command again" in stderr
    assert not (folder / "weights").exists()
    assert fetch(server, folder).returncode == 0


def test_weights_that_another_program_made_are_not_replaced(server: HubServer, tmp_path: Path) -> None:
    (tmp_path / "model/weights").mkdir(parents=True)
    (tmp_path / "model/weights/metadata.json").write_text("other")
    result = fetch(server, tmp_path / "model")
    assert result.returncode == 1
    assert "error: " in result.stderr
    assert "choose another --model_dir" in result.stderr
    assert tree(tmp_path / "model") == ["weights/metadata.json"]


def test_a_stop_between_the_two_renames_is_continued(server: HubServer, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    fetch(server, folder)
    (folder / ".download").mkdir()
    (folder / "weights").rename(folder / ".download/weights")
    server.sent.clear()
    assert fetch(server, folder).returncode == 0
    assert WHOLE in tree(folder)
    assert not server.sent


def test_what_an_older_revision_left_is_not_mixed_in(server: HubServer, tmp_path: Path) -> None:
    old = tmp_path / "model/.download/weights"
    old.mkdir(parents=True)
    (old / "removed.pt").write_text("old")
    (old / "common.pt").write_text("old")
    assert fetch(server, tmp_path / "model").returncode == 0
    assert "weights/removed.pt" not in tree(tmp_path / "model")
    assert (tmp_path / "model/weights/common.pt").read_bytes() == b"c"


def test_a_repository_in_another_format_is_refused_before_the_first_byte(server: HubServer, tmp_path: Path) -> None:
    del server.files["weights/metadata.json"]
    result = fetch(server, tmp_path / "model")
    assert result.returncode == 1
    assert f"error: {NAME} holds no NeMo checkpoint: it has no weights/metadata.json\n" in result.stderr
    assert not server.sent


def test_runs_as_a_user_who_can_write_nowhere_else(server: HubServer, tmp_path: Path) -> None:
    """As in a container started with --user: not root, and HOME is not to be written."""
    other = ["unshare", "--user", "--map-user=1000"] if os.getuid() == 0 else []
    if subprocess.run([*other, "true"], capture_output=True).returncode:
        pytest.skip("root, and the kernel grants no user namespace: nobody else to run as")
    home = tmp_path / "home"
    home.mkdir()
    home.chmod(0o500)
    command = server.command("download_model.py", "--model_dir", tmp_path / "model", "--repository", NAME)
    result = subprocess.run([*other, *command], env=server.environment(home), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert not list(home.iterdir())


def listed(data: dict[str, bytes], folder: Path) -> list[RemoteFile]:
    files = []
    for name, content in data.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
        files.append(RemoteFile(name, len(content), hashlib.sha256(content).hexdigest()))
    return files


def test_pieces_are_known_by_their_names(tmp_path: Path) -> None:
    names = ["a.part10", "a.part9", "a.part11", "b_part_ab", "b_part_aa", "0.0.0", "c.part", "partition-01", "common.pt"]
    plain, split = pieces.find([RemoteFile(name, 1, "") for name in names])
    assert [file.path for file in plain] == ["0.0.0", "c.part", "partition-01", "common.pt"]
    assert {file.path: [piece.path for piece in file.pieces] for file in split} == {
        "a": ["a.part9", "a.part10", "a.part11"],
        "b": ["b_part_aa", "b_part_ab"],
    }


@pytest.mark.parametrize("stop_after", [0, 1, 5, 10, 12, 20, 23])
def test_a_join_that_was_stopped_at_any_byte_is_continued(tmp_path: Path, stop_after: int) -> None:
    """After a kill: the first pieces are in x.joining, the next one in part, and those not yet removed on their own."""
    content = [b"a" * 10, b"b" * 10, b"c" * 3]
    (split,) = pieces.find(listed({f"x.part{i}": piece for i, piece in enumerate(content)}, tmp_path))[1]
    (tmp_path / "x.joining").write_bytes(b"".join(content)[:stop_after])
    for i, end in enumerate((10, 20, 23)):
        if end < stop_after:
            (tmp_path / f"x.part{i}").unlink()
    assert all(copy.problem() is None for copy in split.copies(tmp_path))
    split.join(tmp_path)
    assert tree(tmp_path) == ["x"]
    assert (tmp_path / "x").read_bytes() == b"".join(content)
    assert split.missing(tmp_path) == []
    assert all(copy.problem() is None for copy in split.copies(tmp_path))


def test_joining_takes_the_room_of_one_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = {f"x.part-{i}": bytes([i]) * 1000 for i in range(8)}
    (split,) = pieces.find(listed(content, tmp_path))[1]
    most, fsync = [], os.fsync

    def measure(descriptor: int) -> None:
        fsync(descriptor)
        most.append(sum(path.stat().st_size for path in tmp_path.iterdir()))

    monkeypatch.setattr(os, "fsync", measure)
    split.join(tmp_path)
    assert max(most) == 9000
