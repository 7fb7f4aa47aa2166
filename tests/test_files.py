"""files: what others read appears whole or not at all, and one process at a time makes it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llama2_lora import files


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def stop(written: int) -> None:
    raise KeyboardInterrupt(written)


def test_a_file_appears_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "made" / "file"
    with files.new_file(path) as file:
        file.write(b"new")
        assert not path.exists()
    assert path.read_bytes() == b"new"
    with pytest.raises(KeyboardInterrupt), files.new_file(path) as file:
        stop(file.write(b"half"))
    assert path.read_bytes() == b"new"
    assert names(path.parent) == ["file"]


def test_a_folder_appears_when_it_is_whole(tmp_path: Path) -> None:
    folder = tmp_path / "made" / "folder"
    with files.new_folder(folder) as new:
        (new / "a").write_text("a")
        assert not folder.exists()
    with pytest.raises(ValueError, match="is there already"), files.new_folder(folder):
        pass
    with pytest.raises(KeyboardInterrupt), files.new_folder(folder, replace=True) as new:
        stop((new / "b").write_text("b"))
    assert names(folder) == ["a"]
    with files.new_folder(folder, replace=True) as new:
        (new / "b").write_text("b")
    assert names(folder) == ["b"]
    assert names(folder.parent) == ["folder"]


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    with files.new_folder(tmp_path / "mounted") as new:
        (new / "a").touch()
    (tmp_path / "empty").mkdir()
    with files.new_folder(tmp_path / "empty", recipe="1") as new:
        (new / "a").touch()
    assert names(tmp_path / "empty") == ["a", files.RECIPE]


def test_only_what_a_recipe_made_gives_way_to_another_recipe(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    assert not files.is_up_to_date(folder, "1")
    with files.new_folder(folder, "1"):
        pass
    assert files.is_up_to_date(folder, "1")
    assert not files.is_up_to_date(folder, "2")
    with files.new_folder(folder, "2"):
        pass
    assert files.is_up_to_date(folder, "2")
    (folder / files.RECIPE).unlink()
    (folder / "mine").touch()
    for call in (lambda: files.is_up_to_date(folder, "2"), lambda: files.new_folder(folder, "2").__enter__()):
        with pytest.raises(ValueError, match="holds something else"):
            call()
    assert names(tmp_path) == ["folder"]


def test_a_second_process_is_told_who_is_there_and_a_killed_one_holds_nothing(tmp_path: Path) -> None:
    path = tmp_path / "out" / ".lock"
    program = "import sys, time; from pathlib import Path; from llama2_lora import files\n"
    program += "with files.lock(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    environment = os.environ | {"PYTHONPATH": str(Path(files.__file__).parents[1])}
    with subprocess.Popen([sys.executable, "-c", program, path], stdout=subprocess.PIPE, env=environment) as holder:
        assert holder.stdout.readline() == b"held\n"
        who = rf"{path.parent} is being written by process {holder.pid} on \S+ since {time.strftime('%Y-%m-%d')}"
        with pytest.raises(files.Locked, match=who), files.lock(path):
            pass
        holder.send_signal(signal.SIGKILL)
    with files.lock(path):
        assert path.exists()
    assert names(path.parent) == []


def test_parts_that_do_not_belong_together_never_look_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At every rename, `weights`, which makes the folder complete, stands beside the context it was made with."""
    out, seen = tmp_path / "out", []
    rename = os.rename

    def moving(self: Path, target: Path) -> Path:
        rename(self, target)
        parts = [out / "context" / "v", out / "weights" / "v"]
        seen.append([part.read_text() if part.exists() else "" for part in parts])
        return target

    monkeypatch.setattr(Path, "rename", moving)
    monkeypatch.setattr(Path, "replace", moving)
    for version in ("1", "2"):
        for part in ("context", "weights"):
            (out / ".staging" / part).mkdir(parents=True)
            (out / ".staging" / part / "v").write_text(version)
        files.move_into(out, out / ".staging", ("context", "weights"))
    assert seen == [["1", ""], ["1", "1"], ["1", ""], ["", ""], ["2", ""], ["2", "2"]]
    assert names(out) == ["context", "weights"]
