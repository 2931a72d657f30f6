"""medssl: does pretraining on our own unlabelled scans beat ImageNet weights for our task?

The public functions are imported when first used, so that ``import medssl`` costs milliseconds.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from medssl.models.checkpoints import load_backbone
    from medssl.pipelines.compare import run as compare
    from medssl.pipelines.index import index_scans
    from medssl.pipelines.pretrain import run as pretrain
    from medssl.pipelines.study import run as study
    from medssl.pipelines.transfer import run as transfer
    from medssl.scans.scan import load_scan

__version__ = "0.1.0"
__all__ = [
    "compare",
    "index_scans",
    "load_backbone",
    "load_scan",
    "pretrain",
    "study",
    "transfer",
]

_PUBLIC = {
    "compare": ("medssl.pipelines.compare", "run"),
    "index_scans": ("medssl.pipelines.index", "index_scans"),
    "load_backbone": ("medssl.models.checkpoints", "load_backbone"),
    "load_scan": ("medssl.scans.scan", "load_scan"),
    "pretrain": ("medssl.pipelines.pretrain", "run"),
    "study": ("medssl.pipelines.study", "run"),
    "transfer": ("medssl.pipelines.transfer", "run"),
}


def __getattr__(name: str) -> Any:
    try:
        module, attribute = _PUBLIC[name]
    except KeyError:
        raise AttributeError(f"module 'medssl' has no attribute {name!r}") from None
    return getattr(importlib.import_module(module), attribute)
