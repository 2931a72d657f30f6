"""Public data sets, one file each, fetched by name with licence, citation and checksums."""

from __future__ import annotations

from typing import TYPE_CHECKING

from medssl.registry import Registry

if TYPE_CHECKING:
    from medssl.scans.datasets.base import Dataset

DATASETS: Registry[Dataset] = Registry("dataset", "medssl.scans.datasets", "Dataset")
