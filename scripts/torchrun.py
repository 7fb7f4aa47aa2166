#!/usr/bin/env python
"""torchrun, to be started by hand: the same arguments, and the exit status of the rank that failed first.

    scripts/torchrun.py --nproc-per-node=8 --no-python scripts/run_and_time.sh

torchrun itself answers a run that misses its target with forty lines of ChildFailedError, and every failure with status 1.
"""

from __future__ import annotations

import logging
import sys

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError


def main() -> int:
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # it tells each rank's end a second time
    if sys.argv[1:] in (["-h"], ["--help"]):
        print(__doc__, flush=True)  # torchrun's own follows
    try:
        run.main()
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        print(f"torchrun.py: rank {rank} ended with status {failure.exitcode}", file=sys.stderr)
        return failure.exitcode if failure.exitcode > 0 else 1  # below 0: a signal
    return 0


if __name__ == "__main__":
    sys.exit(main())
