"""The feed: batches of crops on the device, read ahead by workers or gathered where they live."""

from __future__ import annotations

import shutil
import signal
import threading
import warnings
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from medssl.config import Config
from medssl.errors import ConfigError, MachineError, MedsslError
from medssl.transforms.resident import ResidentDtype, ResidentScans, resident_bytes
from medssl.transforms.sample import Sample, Share
from medssl.transforms.sampling import CropSampler

_GB = 10**9

_SPARED = 0.5
"""Share of the device's free memory that ``auto`` leaves to the network and its activations."""

_SHARED_MEMORY = "/dev/shm"  # noqa: S108  (where Linux keeps what workers hand over)


_ENDING_SECONDS = 2.0


class FeedConfig(Config):
    """How crops get to the device. None but ``crops_per_scan`` and ``uint8`` changes a batch.

    Attributes:
        num_workers: processes that read crops; 0 reads in the training process.
        prefetch_factor: batches that each worker reads ahead.
        cache_gb: memory for decoded scans, in GB, shared by all workers of a training process. As
            many scans are kept as fit, the others are read crop by crop.
        crops_per_scan: consecutive crops of a visit of a scan. More makes reading from disk
            cheaper, and batches less diverse: B crops come from about B / crops_per_scan scans.
        resident: whether all scans live on the device, and crops are gathered there without
            workers: ``auto`` on a GPU where they fit, ``always``, or ``never``.
        resident_gb: device memory they may take, in GB.
        resident_dtype: ``float16`` keeps every bit; ``uint8`` takes half the memory and is lossy:
            intensities are rounded to 256 levels.
    """

    num_workers: int = Field(default=0, ge=0)
    prefetch_factor: int = Field(default=2, gt=0)
    cache_gb: float = Field(default=1.0, ge=0)
    crops_per_scan: int = Field(default=1, gt=0)
    resident: Literal["auto", "always", "never"] = "auto"
    resident_gb: float = Field(default=4.0, gt=0)
    resident_dtype: ResidentDtype = "float16"


def feed(
    sampler: CropSampler,
    start_step: int,
    stop_step: int,
    share: Share,
    config: FeedConfig,
    device: torch.device,
) -> Generator[Sample, None, None]:
    """Yield the micro batches of some steps, in order and on the device.

    Which crops they hold is a function of the sampler, the step, the share and ``crops_per_scan``:
    neither workers nor memory nor an earlier start change them. Close the generator to end the
    workers (``with contextlib.closing(feed(...)) as samples``).

    Args:
        sampler: draws the crops.
        start_step: the first step; anywhere in an epoch.
        stop_step: the step after the last.
        share: which micro batches of each step.
        config: how to read.
        device: where they are to be.

    Yields:
        Samples whose images are float32 in [0, 1].

    Raises:
        MedsslError: a scan cannot be read; the error of a worker arrives as it was raised there.
        MachineError: a worker was killed, or the memory asked for cannot be had.
        ConfigError: ``resident: always``, and the scans do not fit ``resident_gb``.
    """
    sampler = as_configured(sampler, config)
    if start_step >= stop_step:
        return
    if lives_on_device(sampler, config, device):
        scans = _resident(sampler, config.resident_dtype, device)
        yield from _ahead(iter(scans.as_dataset(start_step, stop_step, share)), device)
        return
    dataset = sampler.as_dataset(start_step, stop_step, share)
    if not config.num_workers:
        yield from _ahead(iter(dataset), device)
        return
    _ = sampler.cache  # before the fork: its memory is shared
    with _workers(dataset, config, pin_memory=device.type == "cuda") as samples:
        yield from _ahead(samples, device)


def as_configured(sampler: CropSampler, config: FeedConfig) -> CropSampler:
    """Return a sampler that reads as a config says."""
    return sampler.reading(
        cache_bytes=int(config.cache_gb * _GB), crops_per_scan=config.crops_per_scan
    )


def lives_on_device(sampler: CropSampler, config: FeedConfig, device: torch.device) -> bool:
    """Return whether scans are to live on the device.

    Raises:
        ConfigError: they must, and do not fit.
    """
    if config.resident == "never" or (config.resident == "auto" and device.type == "cpu"):
        return False
    needed = resident_bytes(sampler, config.resident_dtype)
    fits = needed <= config.resident_gb * _GB
    if config.resident == "always":
        if not fits:
            raise ConfigError(
                f"training.resident: always, but the {len(sampler.scan_keys)} scans take "
                f"{needed / _GB:.3g} GB as {config.resident_dtype}, and training.resident_gb "
                f"allows {config.resident_gb:.3g}. Raise resident_gb, or set resident=auto."
            )
        return True
    return fits and needed <= (1 - _SPARED) * _free_bytes(device)


def _free_bytes(device: torch.device) -> float:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else float("inf")


def _resident(sampler: CropSampler, dtype: ResidentDtype, device: torch.device) -> ResidentScans:
    try:
        return ResidentScans(sampler, dtype, device)
    except torch.OutOfMemoryError:
        raise MachineError(
            f"the scans take {resident_bytes(sampler, dtype) / _GB:.3g} GB, which the device does "
            "not have free. Set training.resident=never, or resident_dtype=uint8 (lossy)."
        ) from None


def _ahead(samples: Iterator[Sample], device: torch.device) -> Iterator[Sample]:
    """Yield samples on the device; on a GPU, the next one is copied while the step runs."""
    if device.type != "cuda":
        for sample in samples:
            yield sample.to(device)
        return
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))  # which filled the resident scans

    def load() -> Sample | None:
        with torch.cuda.stream(stream):
            sample = next(samples, None)  # resident scans gather on this stream
            if sample is None or sample.images.is_cuda:
                return sample
            if not sample.images.is_pinned():
                sample = sample.pin_memory()
            return sample.to(device, non_blocking=True)

    coming = load()
    while coming is not None:
        current = torch.cuda.current_stream(device)
        current.wait_stream(stream)
        for tensor in _tensors(coming):
            tensor.record_stream(current)  # else its memory would be reused under the step
        yield coming
        coming = load()  # the step is queued by now, and runs meanwhile


def _tensors(sample: Sample) -> list[Tensor]:
    return [sample.images, *([] if sample.masks is None else [sample.masks])]


@dataclass(frozen=True)
class _Refusal:
    """An error for the user, on its way from a worker: torch would wrap it in a traceback."""

    error: MedsslError


class _Reported(Dataset[Any]):
    """A dataset whose errors for users are handed over instead of raised."""

    def __init__(self, dataset: Dataset[Sample]) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]  # torch leaves it to subclasses

    def __getitem__(self, index: int) -> Sample | _Refusal:
        try:
            # Shared here: errors of the queue's own thread are lost, and the parent waits on.
            return self.dataset[index].share_memory()
        except MedsslError as error:
            return _Refusal(error)


@contextmanager
def _workers(
    dataset: Dataset[Sample], config: FeedConfig, *, pin_memory: bool
) -> Iterator[Iterator[Sample]]:
    """Give samples that forked workers read ahead; end the workers afterwards."""
    loader: DataLoader[Any] = DataLoader(
        _Reported(dataset),
        batch_size=None,
        num_workers=config.num_workers,
        multiprocessing_context="fork",
        prefetch_factor=config.prefetch_factor,
        worker_init_fn=_settle_in,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # a seed for workers is drawn from it, and none is needed
    )
    with _quiet_start():
        iterator = iter(loader)
    try:
        yield _received(iterator, config)
    finally:
        iterator._shutdown_workers()  # type: ignore[attr-defined]  # else when it is collected
        for worker in iterator._workers:  # type: ignore[attr-defined]
            if worker.is_alive():  # it ignores SIGTERM
                worker.kill()


def _received(iterator: Iterator[Any], config: FeedConfig) -> Iterator[Sample]:
    while True:
        try:
            sample = next(iterator)
        except StopIteration:
            return
        except (RuntimeError, OSError, EOFError) as error:
            if str(error).startswith("DataLoader worker") or _one_has_ended(iterator):
                raise MachineError(_killed(config)) from None
            raise
        if isinstance(sample, _Refusal):
            raise sample.error
        yield sample


def _one_has_ended(iterator: Iterator[Any]) -> bool:
    """Return whether a worker is no more, whose batch can then not be fetched.

    The connection breaks a moment before the process counts as ended.
    """
    sentinels = [worker.sentinel for worker in iterator._workers]  # type: ignore[attr-defined]
    return bool(connection.wait(sentinels, _ENDING_SECONDS))


def _killed(config: FeedConfig) -> str:
    free = ""
    if Path(_SHARED_MEMORY).is_dir():
        free = f", of which {shutil.disk_usage(_SHARED_MEMORY).free / _GB:.2g} GB are free"
    return (
        f"one of {config.num_workers} workers that read crops was killed. Most often the machine "
        f"is out of memory, or of shared memory ({_SHARED_MEMORY}{free}). Lower "
        "training.num_workers or training.cache_gb, or give a container more (docker run "
        "--shm-size). The last saved state is good."
    )


@contextmanager
def _quiet_start() -> Iterator[None]:
    """Fork so that signals meant for the training process cannot end or startle its workers.

    Ctrl-C and a scheduler's SIGTERM reach every process of the group. They are held back until
    `_settle_in` ignores them: workers end when their parent closes the feed, or is gone. torch's
    handler of SIGCHLD is taken off again: it raises anywhere in the training step, while
    `_received` finds a dead worker when its batch is due.
    """
    in_main_thread = threading.current_thread() is threading.main_thread()
    stops = {signal.SIGINT, signal.SIGTERM}
    child_handler = signal.getsignal(signal.SIGCHLD)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, stops)
    try:
        with warnings.catch_warnings():
            # Python 3.12 and later: workers touch no lock that a thread of ours may hold.
            warnings.filterwarnings("ignore", ".*multi-threaded.*fork", DeprecationWarning)
            yield
    finally:
        if in_main_thread:
            signal.signal(signal.SIGCHLD, child_handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _settle_in(_: int) -> None:
    """Prepare a worker: one thread, and signals are its parent's business."""
    torch.set_num_threads(1)
    for stop in (signal.SIGINT, signal.SIGTERM):
        signal.signal(stop, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})
