"""Preprocessing: orientation, spacing, intensity and foreground crop, done once and stored.

Everything here is deterministic. Geometry goes through MONAI's transforms, whose tensors carry
the affine along, so that what comes out can still be placed in the patient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import (
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from medssl.config import Config
from medssl.errors import DataError
from medssl.scans.scan import Scan

if TYPE_CHECKING:
    from monai.data.meta_tensor import MetaTensor

VERSION = 1
"""Raised whenever the same config would give other voxels, so that old stores are not mixed in."""

BODY_HU = -500.0
"""Half-way from air (-1000 HU) to water (0 HU): above it lies the patient, or the table."""

BODY_FRACTION = 0.1
"""Of the scaled range: above it lies tissue in scans without a calibrated unit; noise is below."""

MAX_MASK_LOSS = 0.01
"""Part of a mask's voxels that the foreground crop may cut off before the scan is refused."""

HIGHEST_THRESHOLD = 0.99
"""A window that ends below the body still shows the body, as all white."""

_SCALED_TOGETHER = "scaled_together"
"""Marks the frames of a cine: scaled one by one they would flicker. So would colours."""

_RAS_LABELS = (("L", "R"), ("P", "A"), ("I", "S"))


class IntensityConfig(Config):
    """How stored values are scaled to [0, 1]; what lies outside is clipped.

    Attributes:
        kind: ``window_hu`` for calibrated CT, ``percentile`` for anything, ``auto`` picks by scan.
        lower: percentile that becomes 0.
        upper: percentile that becomes 1.
        window_hu: the values in HU that become 0 and 1.
    """

    kind: Literal["auto", "percentile", "window_hu"] = "auto"
    lower: float = Field(0.5, ge=0, le=100)
    upper: float = Field(99.5, ge=0, le=100)
    window_hu: tuple[float, float] = (-1000.0, 1000.0)

    @model_validator(mode="after")
    def _ordered(self) -> IntensityConfig:
        if self.lower >= self.upper:
            raise ValueError("lower must be below upper")
        if self.window_hu[0] >= self.window_hu[1]:
            raise ValueError("window_hu must run from low to high")
        return self


class PreprocessingConfig(Config):
    """What is done to each scan before it is stored.

    Attributes:
        orientation: voxel axes point to right, anterior, superior.
        blank: what is replaced by background: burned-in ``text`` and side markers outside the
            body, and the padding around a circular or fan-shaped ``field_of_view``. See
            `medssl.transforms.artifacts` for what is found and what is not.
        spacing_mm: voxel spacing along X, Y, Z; None keeps the scan's own.
        antialias: blur before voxels get coarser, as their number cannot carry the finer detail.
        intensity: scaling to [0, 1].
        crop_foreground: cut off the air around the patient.
        margin_mm: air that is left around the patient.
        foreground_threshold: in scaled values; None: -500 HU for CT, 0.1 otherwise.
        dtype: of the stored image.
    """

    orientation: Literal["RAS"] = "RAS"
    blank: tuple[Literal["text", "field_of_view"], ...] = ()
    spacing_mm: tuple[float, float, float] | None = None
    antialias: bool = True
    intensity: IntensityConfig = IntensityConfig()
    crop_foreground: bool = True
    margin_mm: float = Field(5.0, ge=0)
    foreground_threshold: float | None = Field(None, ge=0, lt=1)
    dtype: Literal["float16"] = "float16"

    @model_validator(mode="after")
    def _positive(self) -> PreprocessingConfig:
        if self.spacing_mm is not None and min(self.spacing_mm) <= 0:
            raise ValueError("spacing_mm must hold positive numbers of millimetres")
        return self

    @field_validator("blank")
    @classmethod
    def _in_one_order(cls, blank: tuple[str, ...]) -> tuple[str, ...]:
        """Sort and deduplicate: the same set, in any order, is the same store."""
        return tuple(sorted(set(blank)))

    @model_serializer(mode="wrap")
    def _without_blank_nothing(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out an empty ``blank``: stores and runs made before it existed stay valid."""
        content: dict[str, Any] = handler(self)
        if not self.blank:
            content.pop("blank", None)
        return content

    def versioned_digest(self) -> str:
        """Return the digest that a stored scan's address is made from."""
        return f"{VERSION}-{self.digest()}"


@dataclass(frozen=True)
class Prepared:
    """A scan as it is stored.

    Attributes:
        image_CS: (C, X, Y), (C, X, Y, Z) or, for a cine, (C, X, Y, T) float16 in [0, 1].
        affine: (4, 4) float64, voxel index to RAS mm. For a 2D scan or a cine the third column is
            the direction across the image.
        spacing_mm: one number a spatial axis.
        masks: by name, uint8 of the image's spatial shape.
        foreground_threshold: the image exceeds it where there is tissue.
        mask_voxels_lost: by name, labelled voxels that the foreground crop cut off.
    """

    image_CS: npt.NDArray[np.float16]
    affine: npt.NDArray[np.float64]
    spacing_mm: tuple[float, ...]
    masks: dict[str, npt.NDArray[np.uint8]]
    foreground_threshold: float
    mask_voxels_lost: dict[str, int] = field(default_factory=dict)


def preprocess(
    scan: Scan, masks: Mapping[str, npt.NDArray[np.uint8]], config: PreprocessingConfig
) -> Prepared:
    """Bring a scan and its masks to the stored form.

    Args:
        scan: voxels and affine as read.
        masks: by name, labels on the scan's own grid, (X, Y) or (X, Y, Z).
        config: what to do.

    Raises:
        DataError: voxels are not finite, a HU window meets a scan without HU, the crop would cut
            off labels, or a cine has a mask.
    """
    if scan.dims == "2D+t":
        return _cine(scan, masks, config)
    if not np.isfinite(scan.voxels_CXYZ).all():
        raise DataError(
            f"scan {scan.scan_key} holds voxels that are not finite numbers. Export it again."
        )
    flat = scan.num_spatial_dims == 2
    names = sorted(masks)
    image = _oriented(scan.voxels_CXYZ, scan.affine, flat=flat)
    # Where the axis across a 2D image went: it is the one that MONAI's orientation moved last.
    across = _axis_of(scan.affine, 2) if flat else None
    labels = (
        _oriented(np.stack([masks[n] for n in names]), scan.affine, flat=flat) if names else None
    )
    if config.blank:
        image = _blanked(image, scan, config)
    if config.spacing_mm is not None:
        image, labels = _respaced(image, labels, config, across)
    scaled = _scaled(image, scan, config.intensity)
    threshold = _threshold(scan, config)
    lost: dict[str, int] = {}
    if config.crop_foreground:
        before = None if labels is None else _count(labels)
        scaled, labels = _cropped(scaled, labels, threshold, config.margin_mm, across)
        if labels is not None and before is not None:
            lost = _losses(scan, names, before, _count(labels))
    return _as_prepared(scaled, labels, names, threshold, lost=lost, across=across)


def _cine(
    scan: Scan, masks: Mapping[str, npt.NDArray[np.uint8]], config: PreprocessingConfig
) -> Prepared:
    """Prepare a cine as one image whose channels are its frames: all get the same treatment."""
    if masks:
        raise DataError(
            f"scan {scan.scan_key} is a cine (2D+t), and masks of cines are not supported. "
            "Leave it out (select.dims)."
        )
    channels, width, height, frames = scan.voxels_CXYZ.shape
    frames_CXY = np.moveaxis(scan.voxels_CXYZ, 3, 1).reshape(-1, width, height)
    flags = (*scan.flags, _SCALED_TOGETHER)
    still = preprocess(replace(scan, voxels_CXYZ=frames_CXY, dims="2D", flags=flags), {}, config)
    image = still.image_CS.reshape(channels, frames, *still.image_CS.shape[1:])
    return replace(still, image_CS=np.ascontiguousarray(np.moveaxis(image, 1, 3)))


def _oriented(
    array: npt.NDArray[Any], affine: npt.NDArray[np.float64], *, flat: bool
) -> MetaTensor:
    import torch
    from monai.data.meta_tensor import MetaTensor
    from monai.transforms.spatial.array import Orientation

    tensor = torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))
    volume = MetaTensor(tensor[..., None] if flat else tensor, affine=torch.from_numpy(affine))
    return _applied(Orientation("RAS", labels=_RAS_LABELS), volume)


def _applied(transform: Callable[..., Any], volume: MetaTensor) -> MetaTensor:
    """Apply a transform of MONAI, which declares less than the tensor with affine it returns."""
    result: MetaTensor = transform(volume)
    return result


def _axis_of(affine: npt.NDArray[np.float64], column: int) -> int:
    """Return the RAS axis that a voxel axis becomes when the volume is reoriented."""
    from nibabel.orientations import io_orientation

    return int(io_orientation(affine)[column, 0])


def _blanked(image: MetaTensor, scan: Scan, config: PreprocessingConfig) -> MetaTensor:
    """Blank artifacts before anything is resampled or scaled.

    Resampling would blur letters and mix padding with air, and percentiles would count both.
    """
    import torch
    from monai.data.meta_tensor import MetaTensor

    from medssl.transforms.artifacts import blank

    blanked = blank(
        image.numpy(),
        config.blank,
        across=_axis_of(scan.affine, 2),
        air_level=BODY_HU if scan.intensity == "HU" else None,
        frames=_SCALED_TOGETHER in scan.flags,
    )
    return MetaTensor(torch.from_numpy(blanked), affine=image.affine)


def _spacing(volume: MetaTensor) -> npt.NDArray[np.float64]:
    affine = np.asarray(volume.affine, dtype=np.float64)
    spacing: npt.NDArray[np.float64] = np.linalg.norm(affine[:3, :3], axis=0)
    return spacing


def _respaced(
    image: MetaTensor, labels: MetaTensor | None, config: PreprocessingConfig, across: int | None
) -> tuple[MetaTensor, MetaTensor | None]:
    import torch
    from monai.transforms.spatial.array import Spacing

    found = _spacing(image)
    wanted = np.asarray(config.spacing_mm, dtype=np.float64)
    if across is not None:
        wanted[across] = found[across]  # a single slice cannot be resampled across itself
    if config.antialias:
        image = _blurred(image, wanted / found)
    options: Any = {"padding_mode": "border", "align_corners": False, "dtype": torch.float32}
    resampled = _applied(Spacing(wanted, mode="bilinear", **options), image)
    if labels is None:
        return resampled, None
    return resampled, _applied(Spacing(wanted, mode="nearest", **options), labels)


def _blurred(image: MetaTensor, factor: npt.NDArray[np.float64]) -> MetaTensor:
    """Blur by the width that downsampling needs, as scikit-image's ``rescale`` chooses it."""
    import torch
    from monai.data.meta_tensor import MetaTensor
    from scipy.ndimage import gaussian_filter

    sigma = np.maximum(0, (factor - 1) / 2)
    if not (sigma > 0).any():
        return image
    # SciPy rather than MONAI's GaussianSmooth, which pads with zeros and so darkens the border.
    blurred = gaussian_filter(image.numpy(), sigma=(0, *sigma), mode="nearest")
    return MetaTensor(torch.from_numpy(blurred), affine=image.affine)


def _scaled(image: MetaTensor, scan: Scan, config: IntensityConfig) -> MetaTensor:
    import torch
    from monai.transforms.intensity.array import (
        ScaleIntensityRange,
        ScaleIntensityRangePercentiles,
    )

    kind = config.kind
    if kind == "auto":
        kind = "window_hu" if scan.intensity == "HU" else "percentile"
    if kind == "window_hu":
        if scan.intensity != "HU":
            raise DataError(
                f"scan {scan.scan_key} has no values in HU, so no HU window applies. "
                "Set preprocessing.intensity.kind to auto or percentile."
            )
        low, high = config.window_hu
        return _applied(ScaleIntensityRange(low, high, 0.0, 1.0, clip=True), image)
    together = bool({"colour", _SCALED_TOGETHER} & set(scan.flags))
    parts = [image] if together else list(image)
    if any(float(part.min()) == float(part.max()) for part in parts):
        return _applied(torch.zeros_like, image)  # a constant channel has no range to scale
    return _applied(
        ScaleIntensityRangePercentiles(
            config.lower, config.upper, 0.0, 1.0, clip=True, channel_wise=not together
        ),
        image,
    )


def _threshold(scan: Scan, config: PreprocessingConfig) -> float:
    if config.foreground_threshold is not None:
        return config.foreground_threshold
    if scan.intensity == "HU" and config.intensity.kind != "percentile":
        low, high = config.intensity.window_hu
        return float(np.clip((BODY_HU - low) / (high - low), 0, HIGHEST_THRESHOLD))
    return BODY_FRACTION


def _cropped(
    image: MetaTensor,
    labels: MetaTensor | None,
    threshold: float,
    margin_mm: float,
    across: int | None,
) -> tuple[MetaTensor, MetaTensor | None]:
    from monai.transforms.croppad.array import CropForeground, SpatialCrop

    if not bool((image > threshold).any()):
        return image, labels
    margin = np.ceil(margin_mm / _spacing(image)).astype(int)
    if across is not None:
        margin[across] = 0
    crop: Any = CropForeground(
        select_fn=lambda x: x > threshold,
        margin=margin.tolist(),
        allow_smaller=True,
        return_coords=True,
    )
    inside, start, end = crop(image)
    if labels is None:
        return inside, None
    return inside, _applied(SpatialCrop(roi_start=start, roi_end=end), labels)


def _losses(
    scan: Scan, names: list[str], before: npt.NDArray[np.int64], after: npt.NDArray[np.int64]
) -> dict[str, int]:
    lost = {}
    for name, labelled, left in zip(names, before.tolist(), after.tolist(), strict=True):
        lost[name] = labelled - left
        if lost[name] > MAX_MASK_LOSS * labelled:
            raise DataError(
                f"scan {scan.scan_key}: the foreground crop would cut off {lost[name]} of "
                f"{labelled} labelled voxels of mask {name!r}. Raise preprocessing.margin_mm, or "
                "set preprocessing.crop_foreground=false."
            )
    return lost


def _count(labels: MetaTensor) -> npt.NDArray[np.int64]:
    counts: npt.NDArray[np.int64] = np.count_nonzero(labels.numpy(), axis=(1, 2, 3))
    return counts


def _as_prepared(
    image: MetaTensor,
    labels: MetaTensor | None,
    names: list[str],
    threshold: float,
    *,
    lost: dict[str, int],
    across: int | None,
) -> Prepared:
    affine = np.asarray(image.affine, dtype=np.float64).copy()
    spacing_mm = _spacing(image).tolist()
    voxels = image.numpy()
    mask_voxels = None if labels is None else labels.numpy()
    if across is not None:
        kept = [axis for axis in range(3) if axis != across]
        affine[:, :3] = affine[:, [*kept, across]]
        spacing_mm = [spacing_mm[axis] for axis in kept]
        voxels = voxels.squeeze(1 + across)
        mask_voxels = None if mask_voxels is None else mask_voxels.squeeze(1 + across)
    return Prepared(
        image_CS=voxels.astype(np.float16),
        affine=affine,
        spacing_mm=tuple(spacing_mm),
        masks={
            name: np.rint(mask_voxels[i]).astype(np.uint8)
            for i, name in enumerate(names)
            if mask_voxels is not None
        },
        foreground_threshold=threshold,
        mask_voxels_lost=lost,
    )
