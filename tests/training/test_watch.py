"""The watch over the ranks: who is silent is named, a stall says where each rank stands, and a healthy run hears nothing."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from llama2_lora.training import watch
from llama2_lora.training.watch import Watch


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(watch, "SILENT_SECONDS", 1.0)
    monkeypatch.setattr(watch, "STALLED_SECONDS", 1.0)
    monkeypatch.setattr(watch, "FIRST_BEAT_SECONDS", 2.0)


class Ranks:
    """Watches of several ranks in one process, over one store."""

    def __init__(self, count: int) -> None:
        self.server = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True)
        self.problems: dict[int, str] = {}
        self.ended = threading.Event()
        self.watches = [
            Watch(rank, count, self.server.clone(), lambda text, r=rank: self.end(r, text)) for rank in range(count)
        ]

    def end(self, rank: int, problem: str) -> None:
        self.problems[rank] = problem
        self.ended.set()

    def __enter__(self) -> Ranks:
        for each in self.watches:
            each.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        for each in self.watches:
            each.__exit__()
            each.thread.join(5)

    def run(self) -> None:
        for each in self.watches:
            each.on_train_epoch_start(None, None)


def freeze(frozen: Watch) -> None:
    frozen.__exit__()
    frozen.thread.join(5)


class SlowStore:
    """A store in which a beat is under way when the run ends."""

    def __init__(self, store: torch.distributed.Store) -> None:
        self.store, self.beating = store, threading.Event()

    def set(self, key: str, value: str) -> None:
        self.beating.set()
        time.sleep(0.3)
        self.store.set(key, value)

    def __getattr__(self, name: str) -> object:
        return getattr(self.store, name)


def test_no_beat_is_under_way_when_the_watch_has_ended() -> None:
    """The interpreter may end next, and aborts over a thread inside the store."""
    store = SlowStore(torch.distributed.TCPStore("127.0.0.1", 0, is_master=True))
    watch = Watch(0, 1, store, lambda problem: None)
    with watch:
        assert store.beating.wait(5)
    assert not watch.thread.is_alive()


def test_ranks_that_beat_and_step_are_left_alone() -> None:
    with Ranks(3) as ranks:
        ranks.run()
        for _ in range(30):
            time.sleep(0.1)
            for each in ranks.watches:
                each.on_train_batch_end(None, None, None, None, 0)
    assert ranks.problems == {}


@pytest.mark.parametrize(("frozen", "seen_by"), [(2, 0), (0, 1)])
def test_a_frozen_rank_is_named(frozen: int, seen_by: int) -> None:
    with Ranks(3) as ranks:
        time.sleep(0.3)
        freeze(ranks.watches[frozen])
        assert ranks.ended.wait(20)
    assert f"rank {frozen} has been frozen for 1.0 s" in ranks.problems[seen_by]


def test_a_rank_that_never_came_ends_the_wait() -> None:
    server = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True)
    found: list[str] = []
    with Watch(0, 2, server.clone(), found.append) as alone:
        alone.thread.join(20)
    assert "a rank that has never come" in found[0]


def test_a_stall_says_where_the_ranks_stand() -> None:
    with Ranks(2) as ranks:
        ranks.run()
        ranks.watches[1].finished = 7
        assert ranks.ended.wait(20)
    problem = ranks.problems[0]
    assert "no step has ended for 1.0 s" in problem
    assert "rank 1 after 7 steps at" in problem
    assert ".py:" in problem  # the line that the main thread is at


def test_before_the_clock_and_after_it_nothing_stalls() -> None:
    """The build and the saving of the adapter have no steps."""
    with Ranks(2) as ranks:
        time.sleep(1.5)
        ranks.run()
        for each in ranks.watches:
            each.on_train_end(None, None)
        time.sleep(1.5)
    assert ranks.problems == {}
