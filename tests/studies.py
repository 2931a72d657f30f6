"""Small studies for the tests: an archive of made-up patients whose identities are all planted."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import nibabel as nib
import yaml

from medssl.randomness import numpy_generator
from medssl.scans.phantom import draw_patient
from samples import NAME, PATIENT_ID, UID_ROOT, write_dicom_series

ROOT = Path(__file__).resolve().parents[1]
SHAPE = (40, 36, 10)
TIMEOUT = 400  # seconds for one command, on a busy machine


def write_archive(folder: Path, num_patients: int = 10) -> Path:
    """Write DICOM series, masks by series, and a table of labels by patient."""
    masks, labels = ["scan,mask"], ["patient,label"]
    for number in range(num_patients):
        label = ("cyst", "solid")[number % 2]
        patient = draw_patient(
            numpy_generator(5, "archive", number), label, oblique=False, shape=SHAPE
        )
        write_dicom_series(
            patient.hounsfield_XYZ,
            patient.affine,
            folder / "images" / f"{number:02d}",
            modality="CT",
            patient_id=f"{PATIENT_ID}-{number}",
            patient_name=f"{NAME}-{number}",
            number=number + 1,
        )
        path = folder / "masks" / f"{number:02d}.nii.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        nib.Nifti1Image(patient.mask_XYZ, patient.affine).to_filename(path)
        masks.append(f"{UID_ROOT}.2.{number + 1},{path.name}")
        labels.append(f"{PATIENT_ID}-{number},{label}")
    (folder / "masks" / "masks.csv").write_text("\n".join(masks) + "\n")
    (folder / "labels.csv").write_text("\n".join(labels) + "\n")
    return folder


def settings(archive: Path, **changes: Any) -> dict[str, Any]:
    """Return a study that takes seconds: three inits, two tasks, two protocols."""
    return {
        "name": "tiny",
        "seed": 3,
        "index": {"folder": str(archive / "images")},
        "workspace": str(archive / "workspace"),
        "preprocessing": {"spacing_mm": [9.0, 9.0, 20.0]},
        "sampling": {"plane": "axial", "crop_size": [24, 24]},
        "backbone": {
            "name": "monai", "depth": 10, "spatial_dims": 2, "base_channels": 8, "stem_stride": 1,
        },
        "pretrain": {
            "training": {
                "steps": 6, "global_batch_size": 4, "checkpoint_every": 2, "validate_every": 3,
                "log_every": 1,
            },
            "validation_batches": 1,
        },
        "inits": {
            "random": {"init": "random"},
            "rotation": {"init": "random", "pretext": {"name": "rotation", "views": 2}},
            "inpainting": {"init": "random", "pretext": {"name": "inpainting", "block": 4}},
        },
        "tasks": [
            {
                "name": "segmentation", "masks": str(archive / "masks"),
                "classes": ["liver", "lesion"],
            },
            {
                "name": "classification", "table": str(archive / "labels.csv"), "by": "patient",
                "id_column": "patient", "label_column": "label",
            },
        ],
        "protocols": [
            {"name": "linear_probe", "max_slices": 3, "max_rows": 500, "strengths": [0.001, 0.1]},
            {
                "name": "fine_tune", "validation_slices": 2,
                "training": {"steps": 4, "global_batch_size": 4, "log_every": 1},
            },
        ],
        "matrix": {"labelled_patients": [2, "all"], "seeds": [0]},
        "splits": {"val_fraction": 0.2, "test_fraction": 0.3},
        "statistics": {"reference": "random", "num_resamples": 200},
        **changes,
    }  # fmt: skip


def pretrain_settings(archive: Path, **training: Any) -> dict[str, Any]:
    """Return a pretraining on ``index``, an index beside its config, that takes seconds on CPUs."""
    study = settings(archive)
    return {
        **{key: study[key] for key in ("seed", "preprocessing", "sampling", "backbone", "splits")},
        "index": "index",
        "pretext": {"name": "rotation", "views": 2},
        "device": "cpu",
        "training": {"global_batch_size": 4, "log_every": 1, **training},
        "validation_batches": 1,
        "tracking": {"mlflow": False},
    }


def write_config(path: Path, content: dict[str, Any]) -> Path:
    """Write a config file."""
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def environment(**changes: str) -> dict[str, str]:
    """Return the environment for a command: one thread, no user settings of MLflow."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    return {**kept, "OMP_NUM_THREADS": "1", "COLUMNS": "100", **changes}


def medssl(*arguments: str | Path, cwd: Path, **changes: str) -> subprocess.CompletedProcess[str]:
    """Run a medssl command to its end."""
    return subprocess.run(
        [sys.executable, "-m", "medssl", *map(str, arguments)],
        cwd=cwd, env=environment(**changes), capture_output=True, text=True, timeout=TIMEOUT,
        check=False,
    )  # fmt: skip
