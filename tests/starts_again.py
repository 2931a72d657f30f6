"""What torchrun starts in the tests, and starts again: each start but the last is killed.

torchrun --nproc-per-node 2 --max-restarts 3 tests/starts_again.py
"""

from __future__ import annotations

import os
import signal
import time

import torch

from medssl.training.distributed import joined

RESTARTS = 3


def main() -> None:
    start = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    with joined("cpu") as ranks:
        total = ranks.sum(torch.ones(1))
        name = f"start {start}"
        seen = ranks.leader_first("prepare", lambda: name)
        if ranks.leads:
            print(f"{seen}: {int(total)} processes", flush=True)
        if start < RESTARTS:
            if ranks.rank == start % 2:
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(60)  # torchrun ends it


if __name__ == "__main__":
    main()
