"""Features of scans from a registered backbone: files in, one row of numbers a scan out.

A path is a NIfTI file, a DICOM file, or a folder of either. Its scans are indexed and prepared as
those were that the backbone was trained on, with the same code, in a folder that is then removed.
Nothing of what a file says of its patient leaves: rows are numbered, and messages name no path.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from medssl.errors import ConfigError, DataError, MedsslError
from medssl.executors.local import Config as LocalConfig
from medssl.models.backbones.base import Backbone
from medssl.models.checkpoints import Contract, check_contract, load_backbone
from medssl.pipelines import prepare
from medssl.scans.building import IndexConfig, build_index
from medssl.scans.inspection import link_alone
from medssl.scans.store import Store
from medssl.tracking.pyfunc import IMAGE_COLUMN, PATH_COLUMN, Predict
from medssl.transforms.cases import CaseReader
from medssl.transforms.preprocessing import PreprocessingConfig
from medssl.transforms.requests import SampleRequest

SERVING_FILE = "serving.json"
"""Beside the contract: how scans were prepared in full, and the size of the crops."""

COLUMNS = ("row", "scan", "num_images", "features")

_CHUNK = 32  # images that go through the backbone at once
_ROUNDING = 1e-3  # by which a value may lie outside [0, 1]


def load(folder: Path) -> Predict:
    """Return what answers a table of paths or images; see `ScanFeatures.answer`.

    Args:
        folder: holds ``backbone.safetensors``, ``contract.json`` and ``serving.json``.

    Raises:
        WeightsError: the files do not belong together.
    """
    return ScanFeatures(folder).answer


def serving_facts(
    preprocessing: dict[str, Any] | None, crop_size: tuple[int, ...] | None
) -> dict[str, Any]:
    """Return the content of ``serving.json``."""
    return {
        "version": 1,
        "preprocessing": preprocessing,
        "crop_size": None if crop_size is None else list(crop_size),
    }


class ScanFeatures:
    """A backbone that takes scans as files or as arrays.

    Its weights are read from safetensors and checked against the contract; the ExportedProgram
    beside it is for those without medssl, as opening one can run what is pickled in it.

    Args:
        folder: see `load`.

    Raises:
        WeightsError: weights, contract and preparation do not belong together.
    """

    def __init__(self, folder: Path) -> None:
        self.backbone: Backbone
        self.contract: Contract
        self.backbone, self.contract = load_backbone(folder)
        facts = json.loads((folder / SERVING_FILE).read_text(encoding="utf-8"))
        self.preprocessing: PreprocessingConfig | None = None
        if facts["preprocessing"] is not None:
            found = PreprocessingConfig.model_validate(facts["preprocessing"])
            check_contract(
                self.contract,
                spacing_mm=found.spacing_mm,
                orientation=found.orientation,
                intensity=found.intensity.model_dump(mode="json"),
                blank=found.blank,
            )
            self.preprocessing = found
        dims = self.contract.spatial_dims
        self.request = SampleRequest(
            spatial_dims=dims,
            crop_size=tuple(facts["crop_size"] or (1,) * dims),
            plane=self.contract.plane,
            num_sequences=self.contract.in_channels,
        )

    def answer(self, table: pd.DataFrame) -> pd.DataFrame:
        """Return the features of every scan.

        Args:
            table: with a column ``path`` (text) or ``image`` (arrays (C, X, Y[, Z]) that are
                prepared already, values in [0, 1]), or both, one of them empty in each row.

        Returns:
            One row a scan: ``row`` of the input and number of the ``scan`` in it, from 0;
            ``num_images`` (slices of the contract's plane, or 1); ``features``, the embedding
            (D,) of the scan: its last layer's mean, over all images of the scan.

        Raises:
            ConfigError: there is no row, or one holds neither, or both.
            DataError: a scan cannot be read or prepared; the row's number is told.
        """
        if PATH_COLUMN in table:  # MLflow makes one row of a dictionary with a list of paths
            table = table.explode(PATH_COLUMN, ignore_index=True)
        if table.empty:
            raise ConfigError(f"give a table with a column {PATH_COLUMN!r} or {IMAGE_COLUMN!r}.")
        rows: list[tuple[int, int, int, list[float]]] = []
        for number, (_, row) in enumerate(table.iterrows()):
            try:
                for scan, images in enumerate(self._images(row)):
                    rows.append((number, scan, len(images), self._features(images)))
            except MedsslError as error:
                raise type(error)(f"row {number}: {error}") from None
        return pd.DataFrame(rows, columns=list(COLUMNS))

    def _features(self, images_NC: Tensor) -> list[float]:
        with torch.inference_mode():
            parts = [
                self.backbone.pool(self.backbone(part)[-1]) for part in images_NC.split(_CHUNK)
            ]
        return [float(value) for value in torch.cat(parts).mean(0)]

    def _images(self, row: pd.Series[Any]) -> Iterator[Tensor]:
        """Yield the images (N, C, *S) of each scan of a row."""
        path, image = (_given(row.get(name)) for name in (PATH_COLUMN, IMAGE_COLUMN))
        if (path is None) == (image is None):
            raise ConfigError(f"give either {PATH_COLUMN!r} or {IMAGE_COLUMN!r}, and one of them.")
        if image is not None:
            yield self._checked(image)[None]
        else:
            yield from self._of_path(Path(str(path)))

    def _checked(self, image: Any) -> Tensor:
        """Return an array that is prepared already as an image (C, *S)."""
        contract = self.contract
        wanted = f"({contract.in_channels}, {', '.join(contract.axis_order[1:])})"
        try:
            array = np.asarray(image, dtype=np.float32)
        except (TypeError, ValueError):
            raise DataError(f"the image is no array of numbers {wanted}.") from None
        if array.ndim != contract.spatial_dims + 1 or array.shape[0] != contract.in_channels:
            raise DataError(f"the image has shape {array.shape}, wanted {wanted}.")
        low, high = float(array.min(initial=0)), float(array.max(initial=0))
        # Comparisons that are also false for what is no number.
        if not array.size or not (low >= -_ROUNDING and high <= 1 + _ROUNDING):
            raise DataError(
                f"the image's values run from {low:.4g} to {high:.4g}, wanted are 0 to 1: an array "
                f"is taken as prepared already. Give the scan's file as {PATH_COLUMN!r}, and it is "
                "prepared as the contract says."
            )
        return torch.from_numpy(np.ascontiguousarray(array))

    def _of_path(self, path: Path) -> Iterator[Tensor]:
        if self.preprocessing is None:
            raise ConfigError(
                "this model's contract does not say in full how scans were prepared (it is of an "
                f"older medssl), so it takes prepared arrays alone: {IMAGE_COLUMN!r}."
            )
        if not path.exists():
            raise DataError("there is no file or folder at the path given. Check its spelling.")
        with _prepared(path, self.preprocessing) as (store, keys):
            for case in CaseReader(store, keys, self.request):
                yield case.images


def _given(value: Any) -> Any:
    """Return a cell's content; None where a table has nothing there."""
    missing = value is None or (isinstance(value, float) and np.isnan(value)) or value is pd.NA
    return None if missing else value


@contextmanager
def _prepared(path: Path, preprocessing: PreprocessingConfig) -> Iterator[tuple[Store, list[str]]]:
    """Yield the prepared scans of a path, and their keys in the order of their files' names."""
    with tempfile.TemporaryDirectory(prefix="medssl-serving-") as made:
        place = Path(made)
        folder = path
        if not path.is_dir():
            folder = place / "file"
            beside = link_alone(path, folder)
        else:
            beside = frozenset()
        config = IndexConfig(folder=folder, quarantine=(), executor=LocalConfig(num_workers=1))
        index = build_index(config, place / "index")
        first = {key: name for key, name, _ in index.file_names()}
        store = prepare.prepare(index, preprocessing, place / "store")
        keys = [key for key in store.scan_keys if not (beside and beside >= set(index.files(key)))]
        yield store, sorted(keys, key=lambda key: (first[key], key))
