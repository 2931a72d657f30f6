"""Several processes, one training: who computes what, and how they agree.

torchrun starts the processes and says by environment variables who is who; torch.distributed
carries gradients (DistributedDataParallel) and sums. One process leads: it alone prepares scans,
writes files and tracks.

    torchrun --nproc-per-node 4 -m medssl pretrain configs/pretrain/rotation_3d.yaml
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from medssl.errors import ConfigError, MachineError

_DAY = timedelta(days=1)
"""How long processes wait for the leader: indexing and preparing an archive takes hours."""

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

    def leader_first(self, name: str, work: Callable[[], T]) -> T:
        """Let the leader do what all need (prepare scans, read an index), then the others.

        Args:
            name: of the work, different for each call.
            work: must find what is already done and not do it twice.

        Raises:
            MachineError: on the others, if the leader failed; its own error says why.
        """
        if self.size == 1:
            return work()
        store = distributed.distributed_c10d._get_default_store()
        key = f"medssl/{name}"
        if not self.leads:
            store.wait([key], _DAY)
            if store.get(key).decode() == _FAILED:
                raise MachineError(f"process {self.rank} stops: process 0 failed at {name!r}.")
            return work()
        try:
            found = work()
        except BaseException:
            store.set(key, _FAILED)
            raise
        store.set(key, _DONE)
        return found


def launched() -> bool:
    """Return whether torchrun, or another launcher of PyTorch's kind, started this process."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


@contextmanager
def joined(device: str) -> Iterator[Ranks]:
    """Join the other processes for as long as the block runs; alone where there are none.

    Args:
        device: the configured one: ``auto``, ``cpu`` or ``cuda``.

    Raises:
        ConfigError: a single GPU is named, which all processes would share.
        MachineError: there are more processes than GPUs on this machine.
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
    distributed.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo")
    try:
        yield Ranks(distributed.get_rank(), distributed.get_world_size(), local_rank)
    finally:
        distributed.destroy_process_group()


def parallel(network: nn.Module, ranks: Ranks) -> nn.Module:
    """Return the network whose gradients are means over all processes; itself where one is alone.

    Buffers (running statistics) are not sent at each step: `medssl.training.buffers` takes their
    mean. Which parameters a batch uses is found out anew at each step: `multi` swaps the head.
    """
    if ranks.size == 1:
        return network
    return DistributedDataParallel(
        network, broadcast_buffers=False, find_unused_parameters=True, gradient_as_bucket_view=True
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
