"""Choose the settings of a first study from what a folder holds: `medssl init`.

What is chosen follows from scans that were measured: their spacing, their size after preparation,
the number of patients, the weights that are on this machine. `medssl.pipelines.new_study_text`
writes it down.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd

from medssl.errors import ConfigError, DataError
from medssl.models.inits._published import places
from medssl.pipelines.weights import weights_of
from medssl.scans.patients import PatientsConfig
from medssl.scans.scan import read_scan
from medssl.scans.splits import MIN_PATIENTS
from medssl.scans.survey import (
    FittingTable,
    Layout,
    Survey,
    count_mask_classes,
    fit_table,
    kinds_of,
)
from medssl.transforms.preprocessing import PreprocessingConfig, preprocess
from medssl.transforms.requests import Plane

Effort = Literal["look", "full"]
Task = Literal["segmentation", "classification", "regression", "none"]
TASKS: tuple[Task, ...] = ("segmentation", "classification", "regression", "none")

_MEASURED_SCANS = 8  # prepared to learn how large they come out
_AXES = {"R": 0, "L": 0, "A": 1, "P": 1, "S": 2, "I": 2}
_PLANES: tuple[Plane, ...] = ("sagittal", "coronal", "axial")  # by the axis across them
_IS_THICK = 1.5  # slices so much thicker than pixels are not cut across
_FULL_RANGE = {("look", 2): 160, ("full", 2): 256, ("look", 3): 80, ("full", 3): 160}
"""Voxels along an axis; scans that would have more are resampled to fewer."""
_BACKBONES = ("timm:efficientnet_lite0", "torchvision:resnet18", "torchvision:resnet50")
_GENERIC = re.compile(r"^(images?|scans?|data|dicom|nifti|imagesT[rs])$", re.IGNORECASE)
_NUMBERS = (3, 5, 10, 25, 50, 100, 250)  # labelled patients
_MANY_CLASSES = 20  # a column of numbers with more values is for regression


@dataclass(frozen=True)
class Labels:
    """Where labels are, and what they are about.

    Attributes:
        task: the downstream task they make.
        path: folder of masks, or table.
        classes: of masks, in the order of their values.
        table: how a table is read.
        column: its column of labels.
    """

    task: Task
    path: Path | None = None
    classes: tuple[str, ...] = ()
    table: FittingTable | None = None
    column: str = ""


@dataclass(frozen=True)
class Measures:
    """What the scans of the most frequent kind are like.

    Attributes:
        dims: of the scans, ``2D`` or ``3D``.
        modality: "" where files do not say.
        num_channels: 1 for grey.
        is_mixed: whether the folder holds other kinds, too.
        num_scans: of this kind, as looked at.
        num_patients: in the whole folder; an estimate, where only a part was looked at.
        spacing_mm: median, along the RAS axes.
    """

    dims: str
    modality: str
    num_channels: int
    is_mixed: bool
    num_scans: int
    num_patients: int
    spacing_mm: tuple[float, ...]


@dataclass(frozen=True)
class Plan:
    """All settings of the new config.

    Attributes:
        sizes: voxels of prepared scans along each axis: the smallest that were measured.
        typical: the same, medians.
        is_here: whether the ImageNet weights of the backbone are on this machine.
        threads: processors that training may use; for the header.
    """

    name: str
    layout: Layout
    patients: PatientsConfig | None
    labels: Labels
    measures: Measures
    crop_dims: int
    plane: Plane | None
    spacing_mm: tuple[float, float, float]
    sizes: tuple[int, ...]
    typical: tuple[int, ...]
    effort: Effort
    device: str
    backbone: str
    is_here: bool


def measure(survey: Survey) -> Measures:
    """Describe the most frequent kind of scans.

    Raises:
        DataError: there are fewer patients than a split needs, or nothing but cines.
    """
    kinds = kinds_of(survey.index)
    fitting = [kind for kind, _ in kinds.most_common() if kind[0] in ("2D", "3D")]
    if not fitting:
        raise DataError("the folder holds cines (2D+t) alone, for which there is no first study.")
    dims, modality, channels = fitting[0]
    chosen = _of_kind(survey, fitting[0])
    patients = int(chosen["patient_key"].nunique())
    if not survey.is_whole:
        patients = round(patients * survey.num_files / survey.num_looked_at)
    if patients < MIN_PATIENTS:
        raise DataError(
            f"the folder holds {_count(len(chosen), 'usable scan')} of "
            f"{_count(patients, 'patient')}. Studies and pretrainings divide patients into "
            f"training, validation and test: at least {MIN_PATIENTS} are needed, and 30 or more "
            "for a verdict."
        )
    spacings = [_in_ras(row["orientation"], row["spacing_mm"]) for _, row in chosen.iterrows()]
    return Measures(
        dims, modality, channels, len(kinds) > 1, len(chosen), patients,
        tuple(float(value) for value in np.median(spacings, axis=0)),
    )  # fmt: skip


def _of_kind(survey: Survey, kind: tuple[str, str, int]) -> pd.DataFrame:
    table = survey.index.accepted
    columns = ("dims", "modality", "num_channels")
    keep = np.logical_and.reduce(
        [table[name] == value for name, value in zip(columns, kind, strict=True)]
    )
    found: pd.DataFrame = table[keep]
    return found


def _in_ras(orientation: str, values: Sequence[float]) -> list[float]:
    """Order values along voxel axes by the RAS axis that each runs along; of 2D scans, as is."""
    letters = orientation[: len(values)]
    if len(values) < 3 or len({_AXES.get(letter) for letter in letters}) < 3:
        return [float(value) for value in values]
    ordered = sorted(zip(letters, values, strict=True), key=lambda pair: _AXES[pair[0]])
    return [float(value) for _, value in ordered]


def choose_plane(measures: Measures) -> Plane | None:
    """Return the plane that 3D scans are cut along: across the thickest slices; else axial."""
    if measures.dims == "2D":
        return None
    thickest = int(np.argmax(measures.spacing_mm))
    others = [value for axis, value in enumerate(measures.spacing_mm) if axis != thickest]
    return _PLANES[thickest] if measures.spacing_mm[thickest] > _IS_THICK * min(others) else "axial"


def read_labels(
    survey: Survey, path: Path, *, task: Task | None = None, column: str | None = None,
    classes: Sequence[str] = (),
) -> Labels:  # fmt: skip
    """Find out what labels are, from where they lie.

    Args:
        survey: of the scans.
        path: a folder of masks, or a table.
        task: what they are for; None: what they look like.
        column: of a table; None: the only one, or the only one that is called like labels.
        classes: names of the masks' values; by default ``class_1`` and so on.

    Raises:
        ConfigError: nothing is at the path, the column is not there or could be several, or the
            names are fewer than the classes.
        LabelError, DataError: they do not fit the scans.
    """
    if path.is_dir():
        if task not in (None, "segmentation"):
            raise ConfigError(f"{path.name!r} is a folder of masks; {task} takes a table (CSV).")
        number = count_mask_classes(survey.index, path)
        if classes and len(classes) < number:
            raise ConfigError(
                f"--classes names {_count(len(classes), 'class')}, and the masks hold values up to "
                f"{number}. Name each, in the order of the values."
            )
        names = tuple(classes) or tuple(f"class_{value}" for value in range(1, number + 1))
        return Labels("segmentation", path, names)
    if not path.is_file():
        raise ConfigError(f"there are no labels at the path given ({path.name!r}).")
    if task == "segmentation":
        raise ConfigError(f"{path.name!r} is a file; segmentation takes a folder of masks.")
    table = fit_table(survey.index, path)
    if table is None:
        raise DataError(
            f"no column of {path.name!r} names the scans: by file name, PatientID or "
            "SeriesInstanceUID. Name patients of NIfTI files with --patients."
        )
    chosen = _choose_column(table, column)
    numbers = {c.name for c in table.columns if c.is_number and c.values > _MANY_CLASSES}
    usual: Task = "regression" if chosen in numbers else "classification"
    return Labels(task or usual, path, (), table, chosen)


def _choose_column(table: FittingTable, column: str | None) -> str:
    names = [found.name for found in table.columns]
    if column is not None:
        if column not in names:
            raise ConfigError(
                f"{table.path.name!r} has no column {column!r} that could be a label. "
                f"There are: {', '.join(names) or 'none'}."
            )
        return column
    named = [found.name for found in table.columns if found.is_named_so]
    for candidates in (named, names):
        if len(candidates) == 1:
            return candidates[0]
    if not names:
        raise DataError(
            f"{table.path.name!r} has no column of labels: one with at least two values, some of "
            "which several scans share."
        )
    raise ConfigError(
        f"several columns of {table.path.name!r} could be the label: {', '.join(names)}. "
        "Choose with --label-column."
    )


def label_columns(survey: Survey, path: Path) -> list[str]:
    """Return the columns of a table that may hold labels, those that are called so first."""
    table = fit_table(survey.index, path)
    return [column.name for column in table.columns] if table else []


def find_labels(survey: Survey, layout: Layout) -> Path | None:
    """Return masks or a table of labels that lie in the folder or beside it, if there are any."""
    if layout.masks is not None:
        return layout.masks
    for path in layout.tables:
        try:
            if label_columns(survey, path):
                return path
        except DataError:
            continue  # a CSV of something else
    return None


def in_words(survey: Survey, measures: Measures) -> str:
    """Return what was seen, in a sentence."""
    seen = "" if survey.is_whole else f" (from {survey.num_looked_at} of {survey.num_files} files)"
    spacing = " x ".join(f"{value:.3g}" for value in measures.spacing_mm)
    return (
        f"{_count(measures.num_scans, 'scan')}{seen}: {measures.modality or 'modality unknown'}, "
        f"{measures.dims}, {spacing} mm; {_count(measures.num_patients, 'patient')}."
    )


def notes_on(survey: Survey, patients: PatientsConfig | None) -> list[str]:
    """Return what people should know of the scans before they run anything."""
    notes = []
    unknown = survey.index.summary["num_scans_of_unknown_patients"]
    if unknown and patients is None:
        notes.append(
            f"{_count(unknown, 'scan')} do not say whose they are; each is taken for a person of "
            "its own. If some belong together, splits would leak: give --patients."
        )
    rejected = survey.index.summary["rejected"]
    files = sum(entry["files"] for reason, entry in rejected.items() if reason != "excluded")
    if files:
        notes.append(f"{_count(files, 'file')} were rejected; medssl index says which, and why")
    if len(kinds_of(survey.index)) > 1:
        notes.append("there are several kinds of scans; the config selects the most frequent")
    return notes


def make_plan(
    survey: Survey, layout: Layout, patients: PatientsConfig | None, labels: Labels,
    *, crop_dims: int, plane: Plane | None, effort: Effort, device: str,
) -> Plan:  # fmt: skip
    """Settle everything else. A few scans are prepared to see how large they come out.

    Raises:
        ConfigError: 3D crops of 2D scans.
        DataError: scans cannot be read, or come out too small.
    """
    measures = measure(survey)
    if crop_dims == 3 and measures.dims == "2D":
        raise ConfigError("the scans are 2D: 3D crops cannot be cut out of them. Choose 2D.")
    is_sliced = crop_dims == 2 and measures.dims == "3D"
    plane = (plane or choose_plane(measures)) if is_sliced else None
    kind = (measures.dims, measures.modality, measures.num_channels)
    # By content, not by key: keys are salted, and the same folder shall give the same config.
    keys = list(_of_kind(survey, kind).sort_values("digest")["scan_key"])
    some = keys[:: max(1, len(keys) // _MEASURED_SCANS)][:_MEASURED_SCANS]
    spacing = _choose_spacing(survey, some, measures, crop_dims, plane, effort)
    shapes = _prepared_shapes(survey, some, spacing, crop_dims, plane)
    backbone, is_here = _choose_backbone()
    return Plan(
        _name_of(layout.scans), layout, patients, labels, measures, crop_dims, plane, spacing,
        tuple(int(size) for size in shapes.min(axis=0)),
        tuple(int(size) for size in np.median(shapes, axis=0)),
        effort, device, backbone, is_here,
    )  # fmt: skip


def _choose_spacing(
    survey: Survey, keys: Sequence[str], measures: Measures, crop_dims: int, plane: Plane | None,
    effort: Effort,
) -> tuple[float, float, float]:  # fmt: skip
    """Return mm along X, Y, Z: equal within crops, and so wide that scans are not too large."""
    own = [*measures.spacing_mm, measures.spacing_mm[0]][:3]
    across = _PLANES.index(plane) if plane else (2 if crop_dims == 2 else None)
    inside = [axis for axis in range(3) if axis != across]
    equal = math.prod(own[axis] for axis in inside) ** (1 / len(inside))
    shapes = _prepared_shapes(survey, keys, (equal,) * 3, crop_dims, plane)
    largest = float(np.median(shapes.max(axis=1)))
    equal *= max(1.0, largest / _FULL_RANGE[effort, crop_dims])
    rounded = _rounded(equal)
    spacing = [rounded if axis in inside else _rounded(own[axis]) for axis in range(3)]
    if measures.dims == "2D":
        spacing[2] = rounded
    return spacing[0], spacing[1], spacing[2]


def _prepared_shapes(
    survey: Survey, keys: Sequence[str], spacing: tuple[float, ...], crop_dims: int,
    plane: Plane | None,
) -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:  # fmt: skip
    """Return the sizes of prepared scans along the axes of crops, (scans, axes)."""
    config = PreprocessingConfig(spacing_mm=(spacing[0], spacing[1], spacing[2]))
    shapes = []
    for key in keys:
        shape = preprocess(read_scan(survey.index, key), {}, config).image_CS.shape[1:]
        if plane is not None:
            shape = tuple(size for axis, size in enumerate(shape) if axis != _PLANES.index(plane))
        shapes.append(shape[:crop_dims])
    return np.array(shapes)


def _rounded(value: float) -> float:
    """Round to two digits, as people write spacings."""
    return float(f"{value:.2g}")


def _choose_backbone() -> tuple[str, bool]:
    """Return the first backbone whose ImageNet weights are on this machine, and whether one is."""
    for name in _BACKBONES:
        if next(places(weights_of(name)), None) is not None:
            return name, True
    return _BACKBONES[1], False


def _name_of(folder: Path) -> str:
    path = folder.resolve()
    name = path.parent.name if _GENERIC.match(path.name) and path.parent.name else path.name
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", name).strip("_.") or "study"


def labelled_numbers(num_patients: int, effort: Effort) -> list[int | str]:
    """Return the numbers of labelled patients to compare, of half of the patients."""
    train = num_patients // 2
    fitting: list[int | str] = [number for number in _NUMBERS if number < 0.8 * train]
    if effort == "full":
        return [*fitting[-4:], "all"]
    return fitting[:3:2] or ["all"]


def _count(number: int, noun: str) -> str:
    plural = noun + ("es" if noun.endswith("s") else "s")
    return f"{number} {noun if number == 1 else plural}"
