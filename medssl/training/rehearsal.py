"""A rehearsal: a few steps of a pretraining on random crops, to see what they cost.

It runs the configured network, task, batch and precision as the loop does, and neither reads a scan
nor writes a file. It belongs in a process of its own: on a CPU memory is how far the peak of this
process's resident memory rises, and peaks never fall.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import repeat
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from medssl.config import ComponentConfig
from medssl.models.build import build_backbone
from medssl.models.inits import INITS
from medssl.pretext import PRETEXT_TASKS
from medssl.randomness import derive_seed, torch_generator
from medssl.training.devices import autocast, right_gradients
from medssl.training.distributed import Ranks
from medssl.training.loop import start_state
from medssl.training.network import build_network
from medssl.training.settings import TrainingConfig
from medssl.training.state import TrainingState
from medssl.training.step import Step
from medssl.transforms.augmentation import AugmentationConfig
from medssl.transforms.sampling import Sample, SampleRequest

MEASURED_STEPS = 3
PATIENCE_S = 60.0
"""After so long no further step is measured."""

_PARTS_TRIED = (1024, 256, 64, 16, 4, 2)
"""Of the configured micro batch; small ones first, which foresee one that is far too large."""

_BY_FAR = 3.0
"""Times the free memory: so much is foreseen for certain, also from small batches."""

_CGROUP = Path("/sys/fs/cgroup")
_NO_MEMORY = ("can't allocate memory", "out of memory", "not enough memory")


@dataclass(frozen=True)
class Scene:
    """What is rehearsed.

    Attributes:
        backbone, pretext: configurations; weights are random ones, which cost the same.
        base: the request that the task starts from.
        training, augmentation: as configured.
        seed: the study's.
        device: where to compute.
        threads: of PyTorch, on the host.
    """

    backbone: ComponentConfig
    pretext: ComponentConfig
    base: SampleRequest
    training: TrainingConfig
    augmentation: AugmentationConfig
    seed: int
    device: torch.device
    threads: int


@dataclass
class Rehearsal:
    """What was found.

    Attributes:
        free_bytes: memory of the device that was free before.
        peaks: micro batch sizes, and the most memory that training with them took, in bytes.
        foreseen_bytes: what the configured size would take, where it was not tried, as it cannot
            fit; else 0.
        failed: whether memory ran out with the configured size.
        step_seconds: of whole steps of the configured size, after one to warm up.
        validation_seconds: of one batch of validation.
        validation_bytes: the most memory of one batch of validation; 0 if not tried.
        state_bytes, checkpoint_bytes: on disk.
    """

    free_bytes: int
    peaks: dict[int, int] = field(default_factory=dict)
    foreseen_bytes: int = 0
    failed: bool = False
    step_seconds: list[float] = field(default_factory=list)
    validation_seconds: float = 0.0
    validation_bytes: int = 0
    state_bytes: int = 0
    checkpoint_bytes: int = 0


def sizes_to_try(micro_batch_size: int) -> list[int]:
    """Return the micro batch sizes to measure, ascending: at least two.

    Batches of one image are not tried unless configured: batch norms may refuse them.
    """
    smaller = {micro_batch_size // part for part in _PARTS_TRIED} - {0, 1}
    return [*sorted(smaller), micro_batch_size, *([] if smaller else [2 * micro_batch_size])]


def line_through(peaks: dict[int, int], size: int) -> float:
    """Return the memory of a micro batch size, in bytes, by the two largest that were measured."""
    (small, low), (large, high) = sorted(peaks.items())[-2:]
    return high + (size - large) * max(0.0, (high - low) / (large - small))


def rehearse(scene: Scene) -> Rehearsal:
    """Run steps of several micro batch sizes, and return what they took.

    Raises:
        ConfigError: the network cannot be trained as configured.
    """
    torch.set_num_threads(scene.threads)
    _first_resident_bytes()
    found = Rehearsal(free_memory(scene.device))
    size = scene.training.global_batch_size // scene.training.micro_batches(1)
    with right_gradients(scene.training, scene.device):
        for micro in sizes_to_try(size):
            if scene.device.type == "cpu" and _too_much(found, micro, size):
                # Beyond what is free the kernel would end a process, perhaps another one.
                if len(found.peaks) > 1:
                    found.foreseen_bytes = int(line_through(found.peaks, size))
                    return found
                continue
            if not _fits(partial(_train, scene, micro, micro == size, found)) and micro <= size:
                found.failed = True
                return found
        if not _fits(partial(_validate, scene, found)):
            found.failed = True
    return found


def _too_much(found: Rehearsal, micro: int, size: int) -> bool:
    """Return whether a micro batch, or by far the configured one, takes more than is free."""
    if not found.peaks:
        return False
    if len(found.peaks) == 1:  # twice the images take at most twice the memory
        return micro > size and 2 * found.peaks[size] > found.free_bytes
    here, there = (line_through(found.peaks, each) for each in (micro, size))
    return here > found.free_bytes or there > _BY_FAR * found.free_bytes


def free_memory(device: torch.device) -> int:
    """Return the bytes that a training may still take: of the GPU, or of machine and container."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = int(psutil.virtual_memory().available)
    try:
        limit = int((_CGROUP / "memory.max").read_text())
        used = int((_CGROUP / "memory.current").read_text())
        lines = (_CGROUP / "memory.stat").read_text().splitlines()
    except (OSError, ValueError):  # no container, or one without a limit ("max")
        return free
    cached = sum(int(line.split()[1]) for line in lines if line.startswith("inactive_file "))
    return min(free, limit - used + cached)


def _fits(work: Callable[[], None]) -> bool:
    """Do something; return whether there was memory for it."""
    try:
        work()
    except (MemoryError, RuntimeError) as error:
        if not (isinstance(error, MemoryError) or any(words in str(error) for words in _NO_MEMORY)):
            raise
        return False
    finally:
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
    return True


def _train(scene: Scene, micro: int, configured: bool, found: Rehearsal) -> None:
    """Train one warm-up step, then one more, or as many whole ones as are measured."""
    device, config = scene.device, scene.training
    _forget_peak(device)
    parts = config.micro_batches(1) if configured else 1
    state = _start(scene)
    state.micro_batches = parts
    task = PRETEXT_TASKS.build(scene.pretext, scene.base.spatial_dims)
    request = task.request(scene.base)
    step = Step(
        state, task,
        config.model_copy(update={"steps": max(config.steps, MEASURED_STEPS + 1)}),
        seed=scene.seed, device=device, augmentation=scene.augmentation, axes=request.axes,
        ranks=Ranks(),
    )  # fmt: skip
    crops = random_crops(request, micro, scene.seed, device)
    begun = time.monotonic()
    seconds = []
    for _ in range(1 + (MEASURED_STEPS if configured else 1)):
        seconds.append(_timed(device, lambda: step.update(repeat(crops))))
        if len(seconds) > 1 and time.monotonic() - begun > PATIENCE_S:
            break
    found.peaks[micro] = _peak(device)
    if configured:
        backbone: Any = state.network.backbone
        found.step_seconds = seconds[1:]
        found.state_bytes = _state_bytes(state)
        found.checkpoint_bytes = _bytes(backbone.state_dict())


def _validate(scene: Scene, found: Rehearsal) -> None:
    """Answer and score a batch of validation, as `ValidationPuzzles` does, twice."""
    device = scene.device
    _forget_peak(device)
    task = PRETEXT_TASKS.build(scene.pretext, scene.base.spatial_dims)
    network = _start(scene).network.eval()
    request = task.request(scene.base)
    size = scene.training.global_batch_size

    def score() -> None:
        generator = torch_generator(scene.seed, "rehearsal", device=device)
        crops = random_crops(request, size, scene.seed, device)
        for batch in task.puzzles(crops, generator):
            with torch.no_grad(), autocast(scene.training, device):
                output = network(batch)
            with torch.no_grad():
                task.loss(output, batch)
                task.metrics(output, batch)

    found.validation_seconds = [_timed(device, score) for _ in range(2)][-1]
    found.validation_bytes = _peak(device)


def random_crops(request: SampleRequest, size: int, seed: int, device: torch.device) -> Sample:
    """Return crops of noise that answer a request in all but their content."""
    generator = torch_generator(seed, "rehearsal", size, device=device)
    shape = (size, request.in_channels, *request.crop_size)
    images = torch.rand(shape, generator=generator, device=device)
    masks = None
    if request.mask:
        masks = torch.zeros((size, *request.crop_size), dtype=torch.int64, device=device)
    return Sample(images, masks, ["noise"] * size)


def _start(scene: Scene) -> TrainingState:
    task = PRETEXT_TASKS.build(scene.pretext, scene.base.spatial_dims)
    backbone, _ = build_backbone(
        scene.backbone,
        INITS.config_class("random")(),
        in_channels=task.in_channels(task.request(scene.base)),
        seed=scene.seed,
    )
    network = build_network(backbone, task, derive_seed(scene.seed, "head", "rehearsal"))
    return start_state(network, scene.training, scene.device)


def _timed(device: torch.device, work: Callable[[], object]) -> float:
    _wait(device)
    begun = time.perf_counter()
    work()
    _wait(device)
    return time.perf_counter() - begun


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return max(0, _peak_resident_bytes() - _first_resident_bytes())


@cache
def _first_resident_bytes() -> int:
    """Return what this process held before its first rehearsal."""
    return int(psutil.Process().memory_info().rss)


def _peak_resident_bytes() -> int:
    """Return the most memory this process ever held.

    Linux's own figure: ``getrusage`` counts what the process was forked from, too.
    """
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        import resource
        import sys

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else 1024 * peak
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def _state_bytes(state: TrainingState) -> int:
    moments = [
        value
        for entry in state.optimizer.state_dict()["state"].values()
        for value in entry.values()
        if isinstance(value, Tensor)
    ]
    average = {} if state.average is None else state.average.state_dict()
    return (
        _bytes(state.network.state_dict())
        + _bytes(average)
        + _bytes(dict(enumerate(moments)))
    )  # fmt: skip


def _bytes(tensors: Mapping[Any, Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
