"""Features of files and arrays from a registered backbone: prepared as its contract says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from exports import MONAI_2D, MONAI_3D, make_checkpoint
from medssl.errors import ConfigError, DataError, WeightsError
from medssl.evaluation.features import extract_features
from medssl.models.checkpoints import load_backbone
from medssl.pipelines import prepare
from medssl.pipelines.serving import SERVING_FILE, ScanFeatures, serving_facts
from medssl.scans.building import IndexConfig, build_index
from medssl.transforms.cases import CaseReader
from medssl.transforms.preprocessing import PreprocessingConfig
from medssl.transforms.requests import SampleRequest
from samples import PLANTED, linear_volume, write_dicom_series

PREPARED = PreprocessingConfig(spacing_mm=(2.0, 2.0, 2.0))


def served(folder: Path, settings: dict[str, Any], **serving: Any) -> Path:
    content = PREPARED.model_dump(mode="json")
    fields = {name: content[name] for name in ("spacing_mm", "orientation", "intensity")}
    make_checkpoint(folder, settings, preprocessing=content, **fields)
    facts = serving_facts(content, None) | serving
    (folder / SERVING_FILE).write_text(json.dumps(facts))
    return folder


@pytest.fixture(scope="module")
def volumes(tmp_path_factory: pytest.TempPathFactory) -> ScanFeatures:
    return ScanFeatures(served(tmp_path_factory.mktemp("volumes"), MONAI_3D))


def test_an_array_is_taken_as_prepared_already(volumes):
    images = np.random.default_rng(1).random((2, 1, 20, 18, 16), dtype=np.float32)
    found = volumes.answer(pd.DataFrame({"image": list(images)}))
    with torch.inference_mode():
        wanted = volumes.backbone.pool(volumes.backbone(torch.from_numpy(images))[-1])
    np.testing.assert_allclose(np.stack(found["features"]), wanted, atol=1e-5)
    assert found[["row", "scan", "num_images"]].to_numpy().tolist() == [[0, 0, 1], [1, 0, 1]]


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((20, 18, 16)), r"row 0: .* has shape \(20, 18, 16\), wanted \(1, X, Y, Z\)"),
        (np.zeros((2, 8, 8, 8)), r"row 0: the image has shape \(2, 8, 8, 8\), wanted"),
        (np.full((1, 8, 8, 8), 300.0), r"values run from 0 to 300, wanted are 0 to 1"),
        (np.full((1, 8, 8, 8), np.nan), r"values run from nan to nan, wanted are 0 to 1"),
        ("a scan", r"row 0: the image is no array of numbers \(1, X, Y, Z\)"),
    ],
)
def test_an_array_that_is_not_prepared_is_refused(volumes, image, message):
    with pytest.raises(DataError, match=message):
        volumes.answer(pd.DataFrame({"image": [image]}))


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (pd.DataFrame(), "give a table with a column 'path' or 'image'"),
        (pd.DataFrame({"path": [None]}), "row 0: give either 'path' or 'image'"),
        (pd.DataFrame({"path": ["a"], "image": [[0.0]]}), "row 0: give either 'path' or 'image'"),
    ],
)
def test_a_row_is_a_path_or_an_image(volumes, table, message):
    with pytest.raises(ConfigError, match=message):
        volumes.answer(table)


def test_a_path_that_leads_nowhere_is_not_repeated(volumes):
    with pytest.raises(DataError, match="row 0: there is no file or folder") as raised:
        volumes.answer(pd.DataFrame({"path": ["/data/DOE_JANE.nii.gz"]}))
    assert "DOE" not in str(raised.value)


def test_a_preparation_that_is_not_the_contracts_is_refused(tmp_path):
    other = PREPARED.model_copy(update={"spacing_mm": (1.0, 1.0, 1.0)}).model_dump(mode="json")
    folder = served(tmp_path, MONAI_3D, preprocessing=other)
    with pytest.raises(WeightsError, match=r"spacing_mm: found \[2\.0, 2\.0, 2\.0\], wanted \[1"):
        ScanFeatures(folder)


def test_other_weights_than_the_contracts_are_refused(tmp_path):
    folder = served(tmp_path / "one", MONAI_3D)
    weights = folder / "backbone.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(WeightsError, match="The two files do not belong together"):
        ScanFeatures(folder)


def test_a_contract_that_does_not_say_how_scans_were_prepared_takes_arrays_alone(tmp_path):
    model = ScanFeatures(served(tmp_path, MONAI_3D, preprocessing=None))
    assert len(model.answer(pd.DataFrame({"image": [np.zeros((1, 8, 8, 8))]}))) == 1
    with pytest.raises(ConfigError, match="it takes prepared arrays alone: 'image'"):
        model.answer(pd.DataFrame({"path": [str(tmp_path)]}))


@pytest.mark.slow
def test_a_series_of_slices_gives_what_the_matrix_probes_and_names_nobody(tmp_path):
    """The same as through an index, a store and the features of the protocols."""
    checkpoint = served(tmp_path / "checkpoint", MONAI_2D, crop_size=[24, 24])
    write_dicom_series(linear_volume((30, 26, 12)), np.eye(4), tmp_path / "DOE_JANE")
    model = ScanFeatures(checkpoint)
    found = model.answer(pd.DataFrame({"path": [[str(tmp_path / "DOE_JANE")]]}))
    index = build_index(IndexConfig(folder=tmp_path / "DOE_JANE"), tmp_path / "index")
    store = prepare.prepare(index, PREPARED, tmp_path / "store")
    backbone, contract = load_backbone(checkpoint)
    request = SampleRequest(spatial_dims=2, crop_size=(24, 24), plane=contract.plane)
    (case,) = extract_features(
        backbone, CaseReader(store, store.scan_keys, request),
        device=torch.device("cpu"), dense=False, max_features=1,
    ).values()  # fmt: skip
    (row,) = found.to_dict("records")
    last = backbone.stages[-1].name
    np.testing.assert_allclose(row["features"], case.layers[last], rtol=1e-4, atol=1e-5)
    assert (row["row"], row["scan"], row["num_images"]) == (
        0,
        0,
        store.entry(case.scan_key).shape[1],
    )
    assert not [word for word in PLANTED if word in found.to_json()]
