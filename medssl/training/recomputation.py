"""Gradient checkpointing: a block's activations are computed again when its gradients are due.

Source: Chen et al., "Training deep nets with sublinear memory cost", 2016.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import MethodType
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from medssl.errors import ConfigError

_LEAST_LAYERS = 2


def recompute_blocks(backbone: nn.Module) -> int:
    """Compute the activations of a network's blocks twice instead of keeping them, in place.

    A block is a member of a sequence of modules with at least two layers that have weights.

    Args:
        backbone: the network.

    Returns:
        The number of blocks.

    Raises:
        ConfigError: it has none whose calls can be taken over: its library traced it into single
            layers.
    """
    blocks = list(_blocks(backbone))
    if not blocks:
        raise ConfigError(
            "training.recompute: this backbone has no blocks that can be computed twice. Set it to "
            "false, and lower training.micro_batch_size instead."
        )
    for block in blocks:
        # Bound to the block, so that a copy of the network (an average of it) uses its own blocks.
        block.forward = MethodType(_recomputed, block)
    return len(blocks)


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    traced = hasattr(module, "graph")  # torch.fx calls the layers, not the modules they lie in
    for child in module.children():
        in_sequence = isinstance(module, nn.Sequential | nn.ModuleList)
        if in_sequence and not traced and _num_layers(child) >= _LEAST_LAYERS:
            yield child
        elif not traced:
            yield from _blocks(child)


def _num_layers(module: nn.Module) -> int:
    return sum(
        parameter.ndim > 1
        for layer in module.modules()
        for parameter in layer.parameters(recurse=False)
    )


def _recomputed(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    plain = MethodType(type(block).forward, block)
    if not block.training:
        return plain(*args, **kwargs)

    def contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        return nullcontext(), _still(block)

    return checkpoint(plain, *args, use_reentrant=False, context_fn=contexts, **kwargs)


@contextmanager
def _still(block: nn.Module) -> Iterator[None]:
    """Keep running statistics as they are: the first pass has moved them."""
    norms = [module for module in block.modules() if isinstance(module, _BatchNorm)]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
        norm.num_batches_tracked = None
    try:
        yield
    finally:
        for norm, (momentum, tracked) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, tracked
