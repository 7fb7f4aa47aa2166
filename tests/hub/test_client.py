"""hub: every way in which a download can fail, by the command that fetches the model from a stand-in for the hub."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from helpers import obey_ctrl_c
from helpers.hub_server import COMMIT, TOKEN, HubServer
from llama2_lora.hub import client

FILES = {
    "context/io.json": b"{}",
    "context/nemo_tokenizer/tokenizer.model": b"t" * 1000,
    "weights/metadata.json": b'{"sharded_backend": "zarr"}',
    "weights/module.large/0.0": os.urandom(3_000_000),
    "weights/module.small/0": os.urandom(70_000),
    "README.md": b"not part of the checkpoint",
}
LARGE = "weights/module.large/0.0"


@pytest.fixture
def server():
    with HubServer("someone/llama-nemo", dict(FILES)) as server:
        yield server


def command(server: HubServer, tmp_path: Path) -> list[str]:
    return server.command("download_model.py", "--model_dir", tmp_path / "model", "--repository", "someone/llama-nemo")


def fetch(server: HubServer, tmp_path: Path, **changes: str) -> subprocess.CompletedProcess[str]:
    arguments = ("--model_dir", tmp_path / "model", "--repository", "someone/llama-nemo")
    return server.run("download_model.py", *arguments, home=tmp_path, **changes)


def assert_complete(folder: Path) -> None:
    there = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert there.pop(".manifest.json")  # what a later call verifies against
    assert there == {path: data for path, data in FILES.items() if path != "README.md"}


def refusal(result: subprocess.CompletedProcess[str]) -> str:
    """The one line on stderr besides the progress bar."""
    assert result.returncode == 1
    return next(line for line in result.stderr.splitlines() if line.startswith("error: "))


def test_dropped_connections_are_continued(server: HubServer, tmp_path: Path) -> None:
    server.dropped[LARGE] = 2
    assert fetch(server, tmp_path).returncode == 0
    assert_complete(tmp_path / "model")
    assert server.sent[LARGE] < 1.5 * len(FILES[LARGE])  # what had arrived was not sent again


def test_an_answer_that_ends_early_is_continued(server: HubServer, tmp_path: Path) -> None:
    server.truncated[LARGE] = 1
    assert fetch(server, tmp_path).returncode == 0
    assert_complete(tmp_path / "model")


def test_a_wrong_hash_is_fetched_again(server: HubServer, tmp_path: Path) -> None:
    server.wrong[LARGE] = 1
    assert fetch(server, tmp_path).returncode == 0
    assert_complete(tmp_path / "model")


def test_a_file_that_stays_wrong_is_named_and_not_kept(server: HubServer, tmp_path: Path) -> None:
    server.wrong[LARGE] = 2
    assert "another hash than the hub lists for weights/module.large/0.0, twice" in refusal(fetch(server, tmp_path))
    assert not (tmp_path / "model/weights").exists()
    assert fetch(server, tmp_path).returncode == 0  # the damage is gone: the next call completes it
    assert_complete(tmp_path / "model")


def test_a_missing_repository(server: HubServer, tmp_path: Path) -> None:
    result = server.run("download_model.py", "--model_dir", tmp_path, "--repository", "no/such", home=tmp_path)
    assert "model no/such is missing, private or gated: check the name, and set HF_TOKEN" in refusal(result)


def test_a_gated_repository_asks_for_terms_and_token_and_takes_the_token(server: HubServer, tmp_path: Path) -> None:
    server.gated = True
    assert "is gated: accept its terms on https://huggingface.co/someone/llama-nemo and set HF_TOKEN" in refusal(
        fetch(server, tmp_path)
    )
    assert "the hub refused the token" in refusal(fetch(server, tmp_path, HF_TOKEN="hf_wrong"))
    assert fetch(server, tmp_path, HF_TOKEN=TOKEN).returncode == 0


def test_a_token_that_is_refused_in_the_middle_is_not_printed(server: HubServer, tmp_path: Path) -> None:
    server.status[LARGE] = (403, "")
    assert "is gated" in refusal(fetch(server, tmp_path, HF_TOKEN=TOKEN))


def test_a_missing_revision(server: HubServer, tmp_path: Path) -> None:
    arguments = ("--model_dir", tmp_path, "--repository", "someone/llama-nemo", "--revision", "v9")
    result = server.run("download_model.py", *arguments, home=tmp_path)
    assert "has no revision v9: see https://huggingface.co/someone/llama-nemo/commits/main" in refusal(result)


def test_a_hub_that_is_down(server: HubServer, tmp_path: Path) -> None:
    server.status[""] = (503, "")
    assert "the hub answered 503 for model someone/llama-nemo: run the command again" in refusal(fetch(server, tmp_path))


def test_a_busy_hub_is_asked_again(server: HubServer, tmp_path: Path) -> None:
    server.busy.update({"": 2, LARGE: 2})
    assert fetch(server, tmp_path).returncode == 0
    assert_complete(tmp_path / "model")


@pytest.mark.parametrize("path", ["", LARGE])
def test_a_permanent_error_is_not_tried_again(server: HubServer, tmp_path: Path, path: str) -> None:
    server.status[path] = (404, "")
    started = time.monotonic()
    assert "the hub answered 404 for model someone/llama-nemo" in refusal(fetch(server, tmp_path))
    assert time.monotonic() - started < 20  # of which most is Python's start
    assert server.requests[path] <= 2


@pytest.mark.parametrize("path", ["", LARGE])
def test_a_circle_of_redirects_ends_after_ten_hops(server: HubServer, tmp_path: Path, path: str) -> None:
    server.circle.add(path)
    assert "its address leads in a circle of redirects" in refusal(fetch(server, tmp_path))
    assert 10 <= server.requests[path] <= 12


def test_without_network_and_token_both_are_named(server: HubServer, tmp_path: Path) -> None:
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9"}
    assert refusal(fetch(server, tmp_path, **nowhere)).endswith("HF_TOKEN is not set, which gated repositories ask for")
    assert refusal(fetch(server, tmp_path, **nowhere, HF_TOKEN=TOKEN)).endswith("; a token is set")


def test_a_name_that_is_none(server: HubServer, tmp_path: Path) -> None:
    result = server.run("download_model.py", "--model_dir", tmp_path, "--repository", "a/b/c", home=tmp_path)
    assert "a/b/c is no repository name: it must read owner/name" in refusal(result)


def test_no_hub(server: HubServer, tmp_path: Path) -> None:
    message = refusal(fetch(server, tmp_path, HF_ENDPOINT="http://127.0.0.1:9"))
    assert "the connection to the hub failed (ConnectionError): check network, proxy and HF_ENDPOINT" in message


def test_kill_in_the_middle_leaves_no_checkpoint_and_the_next_call_goes_on(server: HubServer, tmp_path: Path) -> None:
    server.files[LARGE] = bytes(24_000_000)  # the hub's library writes 10 MiB at a time
    server.pause_at[LARGE] = 12_000_000
    process = subprocess.Popen(command(server, tmp_path), env=server.environment(tmp_path), stderr=subprocess.DEVNULL)
    assert server.paused.wait(30)
    deadline = time.monotonic() + 30
    while client.bytes_in(tmp_path / "model/.download") < 10_000_000:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.kill()
    process.wait()
    assert {path.name for path in (tmp_path / "model").iterdir()} == {".download", ".lock"}
    server.pause_at.clear()
    server.go_on.set()
    server.sent.clear()
    assert fetch(server, tmp_path).returncode == 0
    assert (tmp_path / "model" / LARGE).read_bytes() == server.files[LARGE]
    assert server.sent[LARGE] < 15_000_000


def test_ctrl_c_ends_it_at_once(server: HubServer, tmp_path: Path) -> None:
    server.pause_at[LARGE] = 1_000_000
    environment = server.environment(tmp_path)
    process = subprocess.Popen(
        command(server, tmp_path), env=environment, stderr=subprocess.PIPE, text=True, preexec_fn=obey_ctrl_c
    )
    assert server.paused.wait(30)
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 130  # the server is still silent: a thread that waits for it must not hold the process
    assert "stopped: run the command again, it continues" in process.stderr.read()


def test_offline_takes_what_is_in_the_cache(server: HubServer, tmp_path: Path) -> None:
    assert "someone/llama-nemo at main is not in the cache" in refusal(fetch(server, tmp_path, HF_HUB_OFFLINE="1"))
    program = "import huggingface_hub; huggingface_hub.snapshot_download('someone/llama-nemo')"
    subprocess.run([sys.executable, "-c", program], env=server.environment(tmp_path), check=True, capture_output=True)
    server.sent.clear()
    result = fetch(server, tmp_path, HF_HUB_OFFLINE="1", HF_ENDPOINT="http://127.0.0.1:9")
    assert result.returncode == 0, result.stderr
    assert COMMIT in result.stdout
    assert_complete(tmp_path / "model")
    assert not server.sent


def test_too_small_a_disk_is_refused_before_the_first_byte(server: HubServer, tmp_path: Path) -> None:
    server.listed_bytes[LARGE] = 1 << 60
    assert "GiB free, 1073741824.0 GiB more are needed: free some, or choose a folder on a larger disk" in refusal(
        fetch(server, tmp_path)
    )
    assert not server.sent


def test_a_disk_that_fills_up_in_the_middle(server: HubServer, tmp_path: Path) -> None:
    """A real full disk: a tmpfs in a mount namespace of its own, where files arrive; the check beforehand misses it."""
    namespace = ["unshare", "--map-root-user", "--mount"]
    if subprocess.run([*namespace, "true"], capture_output=True).returncode:
        pytest.skip("the kernel grants no mount namespace here; test_a_quota_in_the_middle takes the same path")
    arriving = tmp_path / "model/.download/.cache"
    arriving.mkdir(parents=True)
    mount = ["sh", "-c", 'mount -t tmpfs -o size=1m tmpfs "$1" && shift && exec "$@"', "sh", arriving]
    run = dict(env=server.environment(tmp_path), capture_output=True, text=True)
    result = subprocess.run([*namespace, *mount, *command(server, tmp_path)], **run)
    assert "the disk is full: free some space and run the command again" in refusal(result)
    assert not (tmp_path / "model/weights").exists()


def test_a_quota_in_the_middle(server: HubServer, tmp_path: Path) -> None:
    """A limit on file size stands for a quota: it needs no root, and the check beforehand does not see it."""
    run = dict(env=server.environment(tmp_path), capture_output=True, text=True)
    result = subprocess.run(["prlimit", "--fsize=1000000", *command(server, tmp_path)], **run)
    assert "the disk is full" in refusal(result)
    assert fetch(server, tmp_path).returncode == 0
    assert_complete(tmp_path / "model")


def test_a_folder_that_cannot_be_written(server: HubServer, tmp_path: Path) -> None:
    (tmp_path / "model").write_text("a file")
    assert "model" in refusal(fetch(server, tmp_path))


def test_digests_of_parts_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"xxhello\n")
    assert client.file_digest(path, "0" * 40, 2, 6) == "ce013625030ba8dba906f756967f9e9ca394464a"  # git hash-object
    assert client.file_digest(path, "0" * 64, 2, 5).startswith("2cf24dba5fb0a30e26e83b2ac5b9e29e")
