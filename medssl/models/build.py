"""Build a backbone with its starting weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from medssl.config import ComponentConfig
from medssl.models.backbones import BACKBONES
from medssl.models.backbones.base import Backbone
from medssl.models.inits import INITS
from medssl.models.inits.base import LoadReport
from medssl.randomness import derive_seed


def build_backbone(
    config: ComponentConfig,
    init_config: ComponentConfig,
    *,
    in_channels: int,
    seed: int,
    expected: Mapping[str, Any] | None = None,
) -> tuple[Backbone, LoadReport]:
    """Return a backbone with the weights of its init, and the report of what was loaded.

    The architecture is constructed from a seed of its own: the same seed gives the same random
    weights, and the process's random state is left as it was.

    Args:
        config: of the backbone.
        init_config: of the init.
        in_channels: channels of the images.
        seed: the study's or cell's seed.
        expected: contract fields that a checkpoint must agree with, for example ``spacing_mm``.

    Raises:
        ConfigError, WeightsError, MachineError: see `medssl.models.inits.base.Init.apply`.
    """
    with seeded_construction(seed, "backbone"):
        backbone = BACKBONES.build(config, in_channels=in_channels)
    report = INITS.build(init_config, expected).apply(backbone)
    return backbone, report


@contextmanager
def seeded_construction(seed: int, *purpose: str | int) -> Iterator[None]:
    """Give the layers constructed inside the block their weights from a seed and a purpose.

    PyTorch's layers draw from the process's CPU generator; it is seeded for the block alone and
    put back after. Construct on the CPU, then move.
    """
    before = torch.get_rng_state()
    # Not torch.manual_seed: that would also seed every accelerator of the process.
    torch.default_generator.manual_seed(derive_seed(seed, "weights", *purpose))
    try:
        yield
    finally:
        torch.set_rng_state(before)
