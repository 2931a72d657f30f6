"""Several processes, one training: who computes what, and how they agree.

torchrun starts the processes and says by environment variables who is who; torch.distributed
carries gradients (DistributedDataParallel) and sums. One process leads: it alone prepares scans,
writes files and tracks.

    torchrun --nproc-per-node 4 -m medssl pretrain configs/pretrain/rotation_3d.yaml
"""

from __future__ import annotations

import inspect
import os
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from medssl.errors import AbandonedError, ConfigError, MachineError
from medssl.training.launch import first_to_end, ignore_termination, launched

_ASK_SECONDS = 0.1
"""How often processes look whether the leader is done; preparing an archive takes hours."""

_LOST_PEER = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer")
"""Words of the errors of collectives; PyTorch gives those of gloo no class of their own."""

_DONE, _FAILED = "done", "failed"

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """The processes of one training, as one of them sees them.

    Attributes:
        rank: this process's number, from 0.
        size: how many there are.
        local_rank: this process's number on its machine: the GPU it uses.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def leads(self) -> bool:
        """Whether this process prepares, writes and tracks."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum over all processes; every one must ask."""
        if self.size > 1:
            distributed.all_reduce(values)
        return values

    def any(self, value: bool, device: torch.device) -> bool:
        """Return whether it holds for any process; every one must ask."""
        if self.size == 1:
            return value
        return bool(self.sum(torch.tensor(float(value), device=device)) > 0)

    def check_same_start(self, step: int) -> None:
        """Make sure that all processes found the same training state; every one must ask.

        Raises:
            MachineError: they did not: the run folder is not the same one everywhere.
        """
        if self.size == 1:
            return
        ends = torch.tensor([step, -step])
        distributed.all_reduce(ends, distributed.ReduceOp.MAX)
        last, first = int(ends[0]), -int(ends[1])
        if first != last:
            raise MachineError(
                f"the processes of this training start from different states, from step {first} to "
                f"step {last}. Give an --out that every machine sees as the same folder."
            )

    def leader_first(self, name: str, work: Callable[[], T]) -> T:
        """Let the leader do what all need (prepare scans, read an index), then the others.

        Args:
            name: of the work, different for each call.
            work: must find what is already done and not do it twice.

        Raises:
            AbandonedError: on the others, if the leader failed; its own error says why.
        """
        if self.size == 1:
            return work()
        store = distributed.distributed_c10d._get_default_store()
        key = f"medssl/{name}"
        if not self.leads:
            while not store.check([key]):
                time.sleep(_ASK_SECONDS)  # not store.wait: signals would wait as well
            if store.get(key).decode() == _FAILED:
                raise AbandonedError(f"process {self.rank} stops: process 0 failed at {name!r}.")
            return work()
        try:
            found = work()
        except BaseException as error:
            _end_early(error)
            store.set(key, _FAILED)
            raise
        store.set(key, _DONE)
        return found


class Vote:
    """Lets all processes know, a step later, the highest of the values that each of them gave.

    It runs on the CPU beside the step, so that nobody waits for it: what is given at one step is
    known at the next, and at the same step in every process.

    Args:
        ranks: the processes; every one must ask at every step.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._given: Tensor | None = None
        self._under_way: distributed.Work | None = None

    def highest(self, value: int) -> int:
        """Give a value; return the highest of those given the last time, 0 the first time.

        A process that is alone hears its own at once.
        """
        if self._ranks.size == 1:
            return value
        found = 0
        if self._given is not None and self._under_way is not None:
            self._under_way.wait()
            found = int(self._given)
        if found:
            return found
        self._given = torch.tensor(int(value))
        self._under_way = distributed.all_reduce(
            self._given, distributed.ReduceOp.MAX, async_op=True
        )
        return found


@contextmanager
def joined(device: str) -> Iterator[Ranks]:
    """Join the other processes for as long as the block runs; alone where there are none.

    Args:
        device: the configured one: ``auto``, ``cpu`` or ``cuda``.

    Raises:
        ConfigError: a single GPU is named, which all processes would share.
        MachineError: there are more processes than GPUs on this machine.
        AbandonedError: another process ended; it says itself why, if it can.
    """
    if not launched():
        yield Ranks()
        return
    on_gpu = device != "cpu" and torch.cuda.is_available()
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if ":" in device:
        raise ConfigError(
            f"device: {device} names one GPU, and {os.environ['WORLD_SIZE']} processes were "
            "started. Set device=cuda: each process takes its own."
        )
    if on_gpu and local_rank >= torch.cuda.device_count():
        raise MachineError(
            f"process {local_rank} of this machine finds {torch.cuda.device_count()} GPU(s). Start "
            "as many processes as there are GPUs (torchrun --nproc-per-node), or set device=cpu."
        )
    if on_gpu:
        torch.cuda.set_device(local_rank)
    with _mortal(), peers_needed():
        backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
        distributed.init_process_group(backend, **_meeting_place())
    try:
        yield Ranks(distributed.get_rank(), distributed.get_world_size(), local_rank)
    except Exception as error:
        _end_early(error)
        raise
    finally:
        distributed.destroy_process_group()


def _meeting_place() -> dict[str, Any]:
    """Return where processes find each other: a part of torchrun's store for this start alone.

    torchrun (of PyTorch 2.14) keeps one store over all restarts, and a process that finds the
    addresses of an earlier start there waits for them for half an hour. Other launchers keep none.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return {}
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = distributed.TCPStore(  # type: ignore[attr-defined]
        os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]),
        is_master=False, wait_for_workers=False,
    )  # fmt: skip
    start = common_name(store, rank, size)
    own = distributed.PrefixStore(f"medssl/{start}", store)  # type: ignore[attr-defined]
    return {"store": own, "rank": rank, "world_size": size}


def common_name(store: Any, rank: int, size: int) -> str:
    """Let processes that start together agree on a name that no earlier start had.

    Each says hello by a word of its own, and the leader answers each word with the name, until all
    have thanked for it: words of an earlier start are answered too, and nobody hears it.
    """
    if rank:
        word = uuid.uuid4().hex
        store.set(f"medssl/hello/{rank}", word)
        while not store.check([f"medssl/answer/{word}"]):
            time.sleep(_ASK_SECONDS)
        name = str(store.get(f"medssl/answer/{word}").decode())
        store.set(f"medssl/thanks/{name}/{rank}", "")
        return name
    name = uuid.uuid4().hex
    missing = set(range(1, size))
    while missing:
        for other in sorted(missing):
            if store.check([f"medssl/thanks/{name}/{other}"]):
                missing.remove(other)
            elif store.check([f"medssl/hello/{other}"]):
                store.set(f"medssl/answer/{store.get(f'medssl/hello/{other}').decode()}", name)
        time.sleep(_ASK_SECONDS)
    return name


@contextmanager
def peers_needed() -> Iterator[None]:
    """Say in one line what a collective says at length when another process has ended.

    Raises:
        AbandonedError: another process ended.
    """
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, distributed.DistError) and not any(
            word in str(error) for word in _LOST_PEER
        ):
            _end_early(error)
            raise
        ignore_termination()
        raise AbandonedError(
            "another process of this training ended, and the others cannot go on without it. "
            "Start the same command again: it goes on from the last checkpoint. "
            "(torchrun --max-restarts does so by itself.)"
        ) from None
    except Exception as error:
        _end_early(error)
        raise


def _end_early(error: BaseException) -> None:
    """Claim that the error of this process is the cause, before the others see it leave."""
    if isinstance(error, Exception) and not isinstance(error, AbandonedError):
        first_to_end()
    ignore_termination()


@contextmanager
def _mortal() -> Iterator[None]:
    """Let SIGTERM end the process at once: PyTorch waits for the others and hears no signal."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def parallel(network: nn.Module, ranks: Ranks) -> nn.Module:
    """Return the network whose gradients are means over all processes; itself where one is alone.

    Buffers (running statistics) are not sent at each step: `medssl.training.buffers` takes their
    mean. Which parameters a batch uses is found out anew at each step: `multi` swaps the head.
    """
    if ranks.size == 1:
        return network
    # Newer PyTorch calls it by another name, and warns of the old one.
    known = inspect.signature(DistributedDataParallel).parameters
    newer = "forward_sync_buffers" in known
    buffers: Any = {"forward_sync_buffers" if newer else "broadcast_buffers": False}
    return DistributedDataParallel(
        network, find_unused_parameters=True, gradient_as_bucket_view=True, **buffers
    )


def synchronised(network: nn.Module, ranks: Ranks, device: torch.device) -> nn.Module:
    """Return the network with batch norms that see the images of all processes at once.

    Raises:
        ConfigError: not on GPUs, where alone PyTorch can do it.
    """
    if ranks.size == 1:
        return network
    if device.type != "cuda":
        raise ConfigError(
            "training.sync_batch_norm: PyTorch synchronises batch norms on GPUs alone, and this "
            f"training runs on the {device.type}. Set it to false, or backbone.norm=group."
        )
    converted: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(network)
    return converted
