"""A folder of scans with labels of every kind, small enough to look at each of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from medssl.downstream import DOWNSTREAM_TASKS
from medssl.downstream.base import DownstreamTask
from medssl.scans.building import IndexConfig, build_index
from medssl.scans.index import Index
from samples import rotation_affine, write_nifti

NAMES = ("anna", "berta", "carla", "dora", "emma", "frida")
SHAPE = {2: (20, 18), 3: (16, 14, 12)}
AFFINE = rotation_affine(spacing_mm=(1.5, 1.0, 2.0))
SETTINGS: dict[str, dict[str, Any]] = {
    "classification": {"table": "labels.csv", "label_column": "kind"},
    "multilabel": {"table": "labels.csv", "label_columns": ["cyst", "bleeding"]},
    "regression": {"table": "labels.csv", "label_column": "age"},
    "segmentation": {"masks": "masks", "classes": ["head", "tail"]},
    "landmarks": {"table": "points.csv", "sigma_mm": 3.0},
}
"""What each task needs to be told of the folder; a new task needs a line here."""

_LABELS = """scan,kind,cyst,bleeding,age
anna,solid,1,0,61.5
berta,cystic,0,1,40
carla,solid,1,,72
dora,cystic,-1,0,55
emma,solid,0,1,33
frida,cystic,1,1,48.25
"""


def place_of(voxel: tuple[float, ...]) -> list[float]:
    """Return the RAS place in mm of a voxel."""
    index = np.array([*voxel, 0.0, 0.0][:3])
    return (AFFINE[:3, :3] @ index + AFFINE[:3, 3]).tolist()


def write_folder(folder: Path, dims: int) -> Index:
    """Write images, masks and tables, and index them."""
    shape = SHAPE[dims]
    points = ["scan,name,x,y,z"]
    for number, name in enumerate(NAMES):
        generator = np.random.default_rng(number)
        image = generator.normal(100, 20, shape).astype(np.float32)
        mask = np.zeros(shape, np.uint8)
        mask[tuple(slice(3, 8 + number % 3) for _ in shape)] = 1
        mask[tuple(slice(size - 6, size - 2) for size in shape)] = 2
        image[mask == 1] += 100
        image[mask == 2] += 200
        write_nifti(folder / "images" / f"{name}.nii.gz", image, AFFINE)
        write_nifti(folder / "masks" / f"{name}.nii.gz", mask, AFFINE)
        for point, centre in (("apex", (4.0, 5.3, 6.0)), ("base", (9.0 + number / 4, 10.0, 5.5))):
            x, y, z = place_of(centre[:dims])
            points.append(f"{name},{point},{x:.4f},{y:.4f},{z:.4f}")
    (folder / "labels.csv").write_text(_LABELS)
    (folder / "points.csv").write_text("\n".join(points) + "\n")
    return build_index(IndexConfig(folder=folder / "images", executor="local"), folder / "index")


def build_task(name: str, folder: Path, dims: int, **changes: Any) -> DownstreamTask:
    """Return a task on the folder."""
    content = {"name": name, **SETTINGS[name], **changes}
    for key in ("table", "masks", "folder"):
        if content.get(key):
            content[key] = folder / content[key]
    config = DOWNSTREAM_TASKS.config_class(name).model_validate(content)
    return DOWNSTREAM_TASKS.build(config, dims, Index.open(folder / "index"))
