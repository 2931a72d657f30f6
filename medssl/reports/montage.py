"""A small picture of one scan: middle slices in three planes, an image, or frames of a cine."""

from __future__ import annotations

import io
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
from PIL import Image

Array = npt.NDArray[Any]

HEIGHT = 320  # pixels of the large panel, and of the whole picture
WIDTH = 484  # the large panel, a gap, and two small panels above each other
_GAP = 4
_SMALL = (HEIGHT - _GAP) // 2
_AIR_HU = -1024.0  # what lies below is padding around the reconstructed field
_PERCENTILES = (0.5, 99.5)
_QUALITY = 80
_MOST_PIXELS = 4096  # along one side, before the picture is made small
_AXIAL, _CORONAL, _SAGITTAL = 2, 1, 0  # the axis of the patient that each plane cuts


def draw_scan(
    voxels_CXYZ: Array,
    affine: npt.NDArray[np.float64],
    *,
    dims: str,
    colour: bool = False,
    hounsfield: bool = False,
    as_stored: bool = False,
) -> bytes:
    """Draw one scan as JPEG of `WIDTH` x `HEIGHT` pixels, with the proportions of the patient.

    Slices are shown as radiologists see them: the patient's right is on the left, front or head is
    up, and in the sagittal plane the front is on the left.

    Args:
        voxels_CXYZ: (C, X, Y), (C, X, Y, Z), or (C, X, Y, T) for a cine.
        affine: (4, 4), voxel index to RAS mm.
        dims: ``2D``, ``3D`` or ``2D+t``.
        colour: the first three channels are red, green and blue; otherwise the first is shown.
        hounsfield: the values are calibrated CT.
        as_stored: the axes do not lie in a patient: X runs to the right, Y down.
    """
    channels_CXYZ = voxels_CXYZ[:3] if colour and len(voxels_CXYZ) >= 3 else voxels_CXYZ[:1]
    if dims == "3D":
        panels = [_plane(channels_CXYZ, affine, axis) for axis in (_AXIAL, _CORONAL, _SAGITTAL)]
    elif dims == "2D+t":
        last = channels_CXYZ.shape[3] - 1
        frames = [channels_CXYZ[..., [number]] for number in (last // 2, 0, last)]
        panels = [_image(frame, affine, as_stored) for frame in frames]
    else:
        panels = [_image(channels_CXYZ[..., np.newaxis], affine, as_stored)]
    low, high = _window([panel for panel, _ in panels], hounsfield)
    return _compose([_grey(panel, low, high, size) for panel, size in panels])


def _plane(
    voxels_CXYZ: Array, affine: npt.NDArray[np.float64], axis: int
) -> tuple[Array, tuple[float, float]]:
    """Return the middle slice across one axis of the patient, (rows, columns, C), and its mm."""
    orientation = nib.orientations.io_orientation(affine)
    voxel_axis = int(np.flatnonzero(orientation[:, 0] == axis)[0])
    middle = voxels_CXYZ.shape[voxel_axis + 1] // 2
    slab = np.take(voxels_CXYZ, [middle], axis=voxel_axis + 1)
    ras = [nib.orientations.apply_orientation(channel, orientation) for channel in slab]
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    ras_spacing = np.empty(3)
    ras_spacing[orientation[:, 0].astype(int)] = spacing
    across, up = (number for number in range(3) if number != axis)
    plane = np.stack([np.take(channel, 0, axis=axis) for channel in ras], axis=-1)
    plane = plane[::-1, ::-1].swapaxes(0, 1)  # right or front on the left; front or head up
    return plane, (plane.shape[0] * ras_spacing[up], plane.shape[1] * ras_spacing[across])


def _image(
    frame_CXYZ: Array, affine: npt.NDArray[np.float64], as_stored: bool
) -> tuple[Array, tuple[float, float]]:
    """Return one image, (rows, columns, C), and its height and width in mm."""
    if not as_stored:
        orientation = nib.orientations.io_orientation(affine)
        if not np.isnan(orientation).any():
            return _plane(frame_CXYZ, affine, int(orientation[2, 0]))
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    image = frame_CXYZ[..., 0].transpose(2, 1, 0)
    return image, (image.shape[0] * spacing[1], image.shape[1] * spacing[0])


def _window(panels: list[Array], hounsfield: bool) -> tuple[float, float]:
    """Return the values shown as black and as white."""
    values = np.concatenate([panel.ravel()[:: max(1, panel.size // 100_000)] for panel in panels])
    values = values[np.isfinite(values)]
    if hounsfield:
        values = values[values > _AIR_HU]
    if not len(values):
        return 0.0, 1.0
    low, high = np.percentile(values, _PERCENTILES)
    if high <= low:  # little beside a flat background
        low, high = values.min(), values.max()
    return float(low), float(max(high, low + 1e-6 * max(1.0, abs(low))))


def _grey(panel: Array, low: float, high: float, size_mm: tuple[float, float]) -> Image.Image:
    """Return a panel in 8 bits, stretched to the proportions of the patient."""
    step = max(1, max(panel.shape[:2]) // _MOST_PIXELS)
    scaled = (panel[::step, ::step].astype(np.float64) - low) / (high - low)
    bytes_ = np.rint(np.nan_to_num(np.clip(scaled, 0, 1)) * 255).astype(np.uint8)
    image = Image.fromarray(bytes_ if bytes_.shape[2] == 3 else bytes_[..., 0])
    longest = max(size_mm)
    height, width = (max(1, round(HEIGHT * length / longest)) for length in size_mm)
    return image.convert("RGB").resize((width, height), Image.Resampling.BILINEAR)


def _compose(panels: list[Image.Image]) -> bytes:
    """Lay one panel over the whole picture, or one large and two small beside it."""
    canvas = Image.new("RGB", (WIDTH, HEIGHT))
    small = (WIDTH - HEIGHT - _GAP, _SMALL)
    boxes = [(0, 0, HEIGHT, HEIGHT), (HEIGHT + _GAP, 0, *small)]
    boxes.append((HEIGHT + _GAP, _SMALL + _GAP, *small))
    if len(panels) == 1:
        boxes = [(0, 0, WIDTH, HEIGHT)]
    for panel, (left, top, width, height) in zip(panels, boxes, strict=True):
        scale = min(width / panel.width, height / panel.height)
        size = max(1, round(panel.width * scale)), max(1, round(panel.height * scale))
        fitted = panel if size == panel.size else panel.resize(size, Image.Resampling.BILINEAR)
        canvas.paste(fitted, (left + (width - size[0]) // 2, top + (height - size[1]) // 2))
    out = io.BytesIO()
    canvas.save(out, "JPEG", quality=_QUALITY, optimize=True)
    return out.getvalue()
