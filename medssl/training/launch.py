"""How this process was started: alone, or by torchrun beside others. Nothing here needs PyTorch.

torchrun says by environment variables who is who. It takes every exit code but 0 for a failure:
then it ends the other processes by SIGTERM and, where it may, starts all of them again.
"""

from __future__ import annotations

import os
import signal
import threading
from datetime import timedelta
from functools import lru_cache

_STORE_PATIENCE = timedelta(seconds=10)
"""How long to wait for torchrun's store: it is there before any process is."""


def launched() -> bool:
    """Return whether torchrun, or another launcher of PyTorch's kind, started several processes."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def by_torchrun() -> bool:
    """Return whether torchrun started this process, even if it is the only one."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def rank() -> int:
    """Return this process's number among those that were started, from 0."""
    return int(os.environ.get("RANK", "0")) if launched() else 0


@lru_cache(maxsize=1)
def first_to_end() -> bool:
    """Return whether this process is the first of all to end early, and so the one to say why.

    What goes wrong for one process soon ends all of them, and people want to read the cause, once.
    The processes ask the store that torchrun keeps; where there is none, the leader speaks.
    """
    if not launched():
        return True
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return rank() == 0
    from torch.distributed import DistError, TCPStore  # type: ignore[attr-defined]

    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    try:
        store = TCPStore(
            os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]),
            is_master=False, timeout=_STORE_PATIENCE, wait_for_workers=False,
        )  # fmt: skip
        return bool(store.add(f"medssl/ended/{attempt}", 1) == 1)
    except (DistError, RuntimeError):  # torchrun itself is gone: better twice than not at all
        return True


def ignore_termination() -> None:
    """Let a process that is ending for another reason end in peace: torchrun sends it SIGTERM."""
    if by_torchrun() and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
