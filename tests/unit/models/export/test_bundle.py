from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from monai.bundle import ConfigParser

from exports import MONAI_2D, PATIENT_KEY, make_backbone, make_contract, make_subject
from medssl.errors import ConfigError
from medssl.models.checkpoints import Contract
from medssl.models.export.base import Subject
from medssl.models.export.bundle import Bundle, describe, inference
from medssl.scans.scan import Scan
from medssl.transforms.preprocessing import PreprocessingConfig, preprocess
from medssl.transforms.requests import ACROSS
from samples import write_nifti

# MONAI's readers of DICOM look for a decoder on NVIDIA's GPUs, though NIfTI is read.
pytestmark = pytest.mark.filterwarnings("ignore:NvImgCodecPydicomReader:UserWarning")

SITE = """
import sys


class Refused:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "medssl":
            raise ImportError("medssl is not to be imported here")


sys.meta_path.insert(0, Refused())
"""


def head(shape: tuple[int, int, int] = (70, 44, 66)) -> npt.NDArray[np.float32]:
    """Return a noisy ball in air."""
    places = np.indices(shape) - np.reshape(shape, (3, 1, 1, 1)) / 2
    radius = np.sqrt((places**2 / np.reshape([900, 300, 700], (3, 1, 1, 1))).sum(axis=0))
    noise = np.random.default_rng(0).normal(0, 60, shape)
    return (np.where(radius < 1, 300 + noise, -990.0 + 0.1 * noise)).astype(np.float32)


def oblique() -> npt.NDArray[np.float64]:
    """Return an affine whose axes point to other sides than RAS, of 0.7, 1.1 and 0.6 mm."""
    affine = np.eye(4)
    affine[:3, :3] = np.array([[0, -1.1, 0], [0, 0, 0.6], [-0.7, 0, 0]])
    affine[:3, 3] = (20, -30, 40)
    return affine


def features_of(subject: Subject, file: Path) -> npt.NDArray[Any]:
    """Return the features of medssl's own road: its reader, its preparation, its backbone."""
    import nibabel as nib

    image = nib.load(file)
    voxels = np.asarray(image.dataobj, dtype=np.float32)[np.newaxis]
    kind = "HU" if subject.values == "hu" else "arbitrary"
    scan = Scan("k1", voxels, np.asarray(image.affine), "3D", kind)
    config = PreprocessingConfig.model_validate(subject.preprocessing)
    image_CXYZ = torch.from_numpy(preprocess(scan, {}, config).image_CS.astype(np.float32))
    if subject.contract.spatial_dims == 3:
        images = image_CXYZ[None]
    else:
        images = image_CXYZ.movedim(1 + ACROSS[str(subject.contract.plane)], 0)
    return subject.answers(images)["embedding"].numpy()


def images_of(subject: Subject, file: Path) -> torch.Tensor:
    """Return what a bundle's network is handed, by MONAI's reading of ``inference.json``."""
    content = json.loads(json.dumps(inference(subject)))  # as it lies in the file
    parser = ConfigParser({name: content[name] for name in ("imports", "preprocessing")})
    prepared: torch.Tensor = parser.get_parsed_content("preprocessing")({"image": file})["image"]
    return prepared


def contract_of(subject: Subject, **preprocessing: Any) -> Contract:
    config = PreprocessingConfig.model_validate(preprocessing)
    return make_contract(
        subject.backbone,
        spacing_mm=config.spacing_mm,
        intensity=config.intensity.model_dump(mode="json"),
        blank=config.blank,
        preprocessing=config.model_dump(mode="json"),
    )


@pytest.mark.parametrize(
    ("values", "preprocessing"),
    [
        ("arbitrary", {"spacing_mm": [1.0, 1.0, 2.0]}),
        ("hu", {"spacing_mm": [0.5, 1.6, 1.0]}),
        ("hu", {"spacing_mm": None, "margin_mm": 3.0}),
        (None, {"spacing_mm": [2.0, 2.0, 2.0], "antialias": False, "intensity": {
            "kind": "percentile", "lower": 2.0, "upper": 98.0}, "crop_foreground": False}),
        ("hu", {"intensity": {"kind": "window_hu", "window_hu": [-100.0, 300.0]},
                "foreground_threshold": 0.3}),
    ],
)  # fmt: skip
def test_monai_prepares_images_as_medssl_does(
    tmp_path: Path, volumes: Subject, values: Any, preprocessing: dict[str, Any]
) -> None:
    contract = contract_of(volumes, **preprocessing)
    subject = make_subject(volumes.backbone, contract=contract, values=values)
    file = write_nifti(tmp_path / "a.nii.gz", head(), oblique())
    found = subject.answers(images_of(subject, file))["embedding"].numpy()
    np.testing.assert_allclose(found, features_of(subject, file), rtol=1e-4, atol=1e-4)


def test_air_alone_stays_whole(tmp_path: Path, volumes: Subject) -> None:
    subject = make_subject(volumes.backbone, contract=contract_of(volumes), values="hu")
    file = write_nifti(tmp_path / "a.nii.gz", np.full((9, 8, 7), -1000.0, np.float32), np.eye(4))
    assert tuple(images_of(subject, file).shape) == (1, 1, 9, 8, 7)


@pytest.mark.parametrize("plane", ["sagittal", "coronal", "axial"])
def test_slices_come_in_order_as_medssl_cuts_them(
    tmp_path: Path, slices: Subject, plane: str
) -> None:
    contract = make_contract(slices.backbone, plane=plane)
    subject = make_subject(slices.backbone, contract=contract)
    file = write_nifti(tmp_path / "a.nii.gz", head((40, 36, 38)), oblique())
    found = subject.answers(images_of(subject, file))["embedding"].numpy()
    np.testing.assert_allclose(found, features_of(subject, file), rtol=1e-4, atol=1e-4)


def run_by_monai(folder: Path, images: Path) -> dict[str, npt.NDArray[Any]]:
    """Run a bundle by MONAI's own command, in a process that cannot import medssl."""
    site = folder / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(SITE)
    options = {"config_file": "configs/inference.json", "meta_file": "configs/metadata.json",
               "bundle_root": ".", "dataset_dir": images, "output_dir": folder / "features",
               "outputs": "['layer4', 'embedding']"}  # fmt: skip
    arguments = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    result = subprocess.run(
        [sys.executable, "-m", "monai.bundle", "run", *arguments],
        cwd=folder / "bundle",
        env={**os.environ, "PYTHONPATH": str(site), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    (written,) = (folder / "features").iterdir()
    assert written.name == "scan.npz"
    with np.load(written) as arrays:
        return dict(arrays)


@pytest.mark.slow
def test_monai_runs_the_bundle_without_medssl(tmp_path: Path, volumes: Subject) -> None:
    Bundle().write(volumes, tmp_path)
    file = write_nifti(tmp_path / "images" / "scan.nii.gz", head(), oblique())
    found = run_by_monai(tmp_path, file.parent)
    assert set(found) == {"layer4", "embedding"}
    np.testing.assert_allclose(found["embedding"], features_of(volumes, file), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_monai_runs_a_bundle_of_slices_without_medssl(tmp_path: Path, slices: Subject) -> None:
    Bundle().write(slices, tmp_path)
    file = write_nifti(tmp_path / "images" / "scan.nii.gz", head((40, 36, 38)), oblique())
    found = run_by_monai(tmp_path, file.parent)
    np.testing.assert_allclose(found["embedding"], features_of(slices, file), rtol=1e-4, atol=1e-4)


def test_metadata_has_the_fields_of_monais_schema(volumes: Subject) -> None:
    content = describe(volumes)
    wanted = {
        "version", "monai_version", "pytorch_version", "numpy_version", "task", "description",
        "authors", "copyright", "network_data_format", "schema", "changelog",
        "required_packages_version",
    }  # fmt: skip
    assert wanted <= set(content)
    image = content["network_data_format"]["inputs"]["image"]
    assert (image["num_channels"], image["value_range"]) == (1, [0, 1])
    assert PATIENT_KEY not in json.dumps(content)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"preprocessing": {"blank": ["text"]}}, "cannot blank text"),
        ({"preprocessing": {}}, "intensity kind auto.*--values hu .*--values arbitrary"),
        ({"preprocessing": None}, "how the scans of this checkpoint were prepared"),
    ],
)
def test_what_monai_cannot_do_alike_is_refused(
    volumes: Subject, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        Bundle().check(make_subject(volumes.backbone, **changes))


def test_a_window_for_images_without_hu_is_refused(volumes: Subject) -> None:
    window = {"intensity": {"kind": "window_hu"}}
    with pytest.raises(ConfigError, match="needs --values hu, found --values arbitrary"):
        Bundle().check(make_subject(volumes.backbone, preprocessing=window, values="arbitrary"))


def test_2d_scans_and_channels_of_unknown_kind_are_refused() -> None:
    backbone = make_backbone(MONAI_2D)
    flat = make_subject(backbone, contract=make_contract(backbone, plane=None))
    with pytest.raises(ConfigError, match="the contract names no plane"):
        Bundle().check(flat)
    with pytest.raises(ConfigError, match="takes one channel, found 3"):
        Bundle().check(make_subject(make_backbone(MONAI_2D, in_channels=3)))
