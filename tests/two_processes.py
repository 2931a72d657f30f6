"""What torchrun starts in the tests: each task's training, its weights and losses to a file.

torchrun --nproc-per-node 2 tests/two_processes.py STORE OUT
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from medssl.errors import MachineError
from medssl.scans.store import Store
from medssl.training.distributed import joined
from training import EVERY_TASK, Training, configured, pretext_task

SETTINGS = {"steps": 3, "global_batch_size": 8}


def main(store: Store, out: Path) -> None:
    with joined("cpu") as ranks:
        ranks.check_same_start(7)
        try:
            ranks.check_same_start(5 * ranks.rank)
        except MachineError as error:
            (out / f"apart-{ranks.rank}.txt").write_text(str(error))
        for name, dims in EVERY_TASK:
            training = Training(store, pretext_task(name, dims), configured(**SETTINGS))
            seen: list[str] = []
            state = training.run(training.state(), ranks=ranks, seen=seen)
            torch.save(
                {
                    "weights": state.network.state_dict(),
                    "logged": training.logged,
                    "seen": seen,
                    "micro_batches": state.micro_batches,
                },
                out / f"{name}-{dims}-{ranks.rank}.pt",
            )


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Store.open(Path(sys.argv[1])), Path(sys.argv[2]))
