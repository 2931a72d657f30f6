"""The device: which one, in what precision, and with randomness that belongs to the step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from medssl.errors import ConfigError, MachineError
from medssl.training.distributed import Ranks
from medssl.training.settings import TrainingConfig

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def select_device(name: str, ranks: Ranks | None = None) -> torch.device:
    """Return the device that a config names; ``auto`` is the GPU where there is one.

    Args:
        name: ``auto``, ``cpu``, ``cuda`` or ``cuda:1``.
        ranks: the processes; each takes the GPU of its own number.

    Raises:
        ConfigError: the name is not a device's.
        MachineError: the device is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device: {name!r} is no device. Use auto, cpu or cuda.") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise MachineError(
            f"device: {name} is asked for, and torch sees no GPU on this machine. "
            "Set device=auto, or run medssl doctor to see why."
        )
    if device.type == "cuda" and ranks is not None and ranks.size > 1:
        return torch.device("cuda", ranks.local_rank)
    return device


def autocast(config: TrainingConfig, device: torch.device) -> torch.autocast:
    """Return the autocast context of the configured precision."""
    dtype = _DTYPES.get(config.precision)
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


@contextmanager
def right_gradients(config: TrainingConfig, device: torch.device) -> Iterator[None]:
    """Train without oneDNN where its gradients are wrong: convolutions in bfloat16 on a CPU.

    Measured with torch 2.14.1: weight gradients of 3 x 3 convolutions over one or two voxels (small
    tiles) were wrong or NaN in 39 of 40 tries, other ones each time, and right without oneDNN and
    in float32 (tests/unit/training/test_devices.py).
    """
    if device.type != "cpu" or config.precision == "fp32":
        yield
        return
    before = torch.backends.mkldnn.enabled
    torch.backends.mkldnn.set_flags(_enabled=False, _fp32_precision=None)
    try:
        yield
    finally:
        torch.backends.mkldnn.set_flags(_enabled=before, _fp32_precision=None)


@contextmanager
def seeded_layers(seed: int, device: torch.device) -> Iterator[None]:
    """Let layers that draw for themselves (dropout, stochastic depth) draw from a seed.

    They use the device's own generator, which is put back after the block.
    """
    index = device.index or 0
    generator = (
        torch.default_generator
        if device.type == "cpu"
        else torch.get_device_module(device).default_generators[index]
    )
    before = generator.get_state()
    generator.manual_seed(seed)
    try:
        yield
    finally:
        generator.set_state(before)
