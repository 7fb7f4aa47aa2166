"""The run's log: typed events, in legal order, from rank 0 only, over mlperf_logging.mllog.

The order is the compliance checker's (rulesets 5.0.0 to 6.1.0) and NVIDIA's v5.1 dialect. An event that is out of order
is a bug of ours and raises: a log that the checker refuses afterwards has cost a cluster.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from mlperf_logging import mllog
from mlperf_logging.mllog import constants

from llama2_lora.config import rules
from llama2_lora.config.settings import Settings

# event -> (states in which it is legal, state after it; None: stays)
_ORDER: dict[str, tuple[tuple[str, ...], str | None]] = {
    "cache_clear": (("new",), None),
    "init_start": (("new",), "init"),
    "describe": (("init",), None),
    "init_stop": (("init",), "ready"),
    "run_start": (("ready",), "run"),
    "block_start": (("run",), "block"),
    "block_stop": (("block",), "run"),
    "eval_start": (("run",), "eval"),
    "eval_accuracy": (("eval",), "evaluated"),
    "eval_stop": (("evaluated",), "run"),
    "run_stop": (("run",), "stopped"),
}


class MLPerfLog:
    """One run's log. Ranks other than 0 keep the order but write nothing."""

    def __init__(self, rank: int) -> None:
        self._write = rank == 0
        self._state = "new"
        self._samples = 0
        self._logger = mllog.get_mllogger()

    @property
    def running(self) -> bool:
        """True between run_start and run_stop."""
        return self._state in ("run", "block", "eval", "evaluated")

    def cache_clear(self) -> None:
        """The node's page cache was dropped before this run."""
        self._advance("cache_clear")
        self._emit(self._logger.event, constants.CACHE_CLEAR, True)

    def init_start(self) -> None:
        """The clock of the 30 minutes' initialization starts: log it before the heavy imports."""
        self._advance("init_start")
        self._emit(self._logger.start, constants.INIT_START)

    def describe(self, values: Mapping[str, Any]) -> None:
        """Points between init_start and init_stop: submission, hyperparameters, seed, parallelism, precision."""
        self._advance("describe")
        for key, value in values.items():
            self._emit(self._logger.event, key, value)

    def init_stop(self) -> None:
        self._advance("init_stop")
        self._emit(self._logger.end, constants.INIT_STOP)

    def run_start(self) -> None:
        """The clock that is scored starts. From here on the data set may be read."""
        self._advance("run_start")
        self._emit(self._logger.start, constants.RUN_START)

    def block_start(self, samples: int) -> None:
        """Training between two evaluations starts after `samples` sequences."""
        self._advance("block_start")
        self._samples = samples
        self._emit(self._logger.start, constants.BLOCK_START, None, samples)

    def block_stop(self, samples: int) -> None:
        """`samples` is that of the block's start: the checker and the published logs pair the two by it."""
        self._advance("block_stop")
        self._emit(self._logger.end, constants.BLOCK_STOP, None, samples)

    def eval_start(self, samples: int) -> None:
        self._advance("eval_start")
        self._samples = samples
        self._emit(self._logger.start, constants.EVAL_START, None, samples)

    def eval_accuracy(self, loss: float, samples: int) -> None:
        """`loss` in nats after `samples` training sequences; the key is called accuracy in every benchmark."""
        self._advance("eval_accuracy")
        self._emit(self._logger.event, constants.EVAL_ACCURACY, loss, samples)

    def eval_stop(self, samples: int) -> None:
        self._advance("eval_stop")
        self._emit(self._logger.end, constants.EVAL_STOP, None, samples)

    def run_stop(self, success: bool, samples: int) -> None:
        """The scored clock ends, with status success or aborted."""
        self._advance("run_stop")
        status = constants.SUCCESS if success else constants.ABORTED
        self._emit(self._logger.end, constants.RUN_STOP, None, samples, {"status": status})

    def abort(self, samples: int | None = None) -> None:
        """Close what is open and stop as aborted, from any state in which the scored clock runs; else do nothing.

        samples: trained on so far; None: as many as at the last block or evaluation.
        """
        samples = self._samples if samples is None else samples
        if self._state == "block":
            self.block_stop(self._samples)
        elif self._state in ("eval", "evaluated"):
            self._state = "evaluated"  # there is no accuracy to log
            self.eval_stop(self._samples)
        if self._state == "run":
            self.run_stop(False, samples)

    def train_loss(self, loss: float, lr: float, samples: int) -> None:
        """Mean over the last global batch, in nats, and the learning rate that the schedule has reached: the next update's."""
        self._emit(self._logger.event, "train_loss", loss, samples, {"lr": lr})

    def tracked(self, stats: Mapping[str, float], samples: int) -> None:
        """Anything worth a curve: throughput (sequences/s), step and evaluation time (s)."""
        self._emit(self._logger.event, "tracked_stats", dict(stats), samples, {"step": samples})

    def _advance(self, event: str) -> None:
        legal, after = _ORDER[event]
        if self._state not in legal:
            raise RuntimeError(f"{event} in state {self._state!r}: legal in {', '.join(legal)} only")
        self._state = after or self._state

    def _emit(self, how: Any, key: str, value: Any = None, samples: int | None = None, more: Any = None) -> None:
        if not self._write:
            return
        metadata = {} if samples is None else {"samples_count": samples}
        how(key, value, metadata=metadata | (more or {}), stack_offset=3)
        sys.stdout.flush()  # a run that is killed must leave what it said


def submission_values(settings: Settings) -> dict[str, Any]:
    """What the log says of the submission, in the order of the published logs."""
    s = settings.submission
    platform = s.platform or settings.system.name
    if settings.rehearsal:
        platform = f"{settings.system.platform.upper()} rehearsal, not a submission"
    return {
        constants.SUBMISSION_BENCHMARK: rules.NAME,
        constants.SUBMISSION_ORG: s.organization,
        constants.SUBMISSION_DIVISION: s.division,
        constants.SUBMISSION_STATUS: s.status,
        constants.SUBMISSION_PLATFORM: platform,
    }


if __name__ == "__main__":  # one line for a launcher that has just dropped the caches of its node
    MLPerfLog(rank=0).cache_clear()
