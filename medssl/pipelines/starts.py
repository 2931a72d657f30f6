"""What each init starts from, in words, before anything is built."""

from __future__ import annotations

from medssl.config import ComponentConfig
from medssl.models.checkpoints import checkpoint_name, lineage, load_contract
from medssl.models.origin import taken_to_3d


def start_in_words(
    backbone: ComponentConfig, init: ComponentConfig, pretext: ComponentConfig | None = None
) -> str:
    """Return what a plan says of an init: ``rotation from inflated ImageNet``.

    Args:
        backbone: the network.
        init: the weights.
        pretext: the task that the backbone is pretrained with from there, if it is.

    Raises:
        WeightsError: the init is a checkpoint, and none is there or its contract cannot be read.
    """
    path = getattr(init, "path", None)
    if init.name == "checkpoint" and path is not None:
        words = f"checkpoint {checkpoint_name(path)!r} ({lineage(load_contract(path))})"
    else:
        words = taken_to_3d(init.name, backbone.name) or init.name
    return f"{pretext.name} from {words}" if pretext else words
