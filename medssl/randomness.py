"""Randomness that is passed in: one generator per purpose, derived from the study's seed.

No global seed is ever set. A purpose is a tuple of words and numbers, for example
``("augmentation", step)``; the same seed and purpose give the same stream on every machine,
whatever else ran before and however many workers there are.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


def derive_seed(seed: int, *purpose: str | int) -> int:
    """Return a 63-bit seed for one purpose.

    Args:
        seed: the study's seed.
        purpose: words and numbers that name the use; their order matters.
    """
    text = "\x1f".join([str(int(seed)), *(str(part) for part in purpose)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def numpy_generator(seed: int, *purpose: str | int) -> np.random.Generator:
    """Return NumPy's generator for one purpose."""
    return np.random.default_rng(derive_seed(seed, *purpose))


def torch_generator(
    seed: int, *purpose: str | int, device: torch.device | str = "cpu"
) -> torch.Generator:
    """Return a generator on ``device`` for one purpose."""
    import torch

    return torch.Generator(device=device).manual_seed(derive_seed(seed, *purpose))
