"""Artifacts that give puzzles away: burned-in text and side markers, and the field of view's rim.

A letter burned into a corner tells which way is up, and which tile of a jigsaw it lies in; a circle
of padding tells how far a tile is from the middle. Both are blanked before a scan is stored, on the
scan's own grid and in its own values. Both err on the side of leaving things in: what is removed
here is lost to every later task.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from scipy import ndimage

Kind = Literal["text", "field_of_view"]

Array = npt.NDArray[Any]
Mask = npt.NDArray[np.bool_]

BACKGROUND_FRACTION = 0.1
"""Of the range of values: up to it lies background, where values have no calibrated unit."""

MIN_SATURATED = 16
"""Voxels that must share the scan's maximum: print does, the brightest noise does not."""

MIN_BRIGHTNESS = 0.75
"""Of the range of values, what a letter's brightest voxel must reach: smoothly drawn small letters
may stay below the maximum, which only their neighbours in the word have."""

MAX_TEXT_AREA = 0.01
"""Of a slice's voxels, those of one letter, or of one word whose letters touch."""

MAX_TEXT_EXTENT = 0.5
"""Of a slice's longer side, the longest side of a letter or word."""

MAX_STROKE = 0.02
"""Of a slice's longer side, the width of a stroke, and the gap between a word's letters."""

MIN_STROKE_LIMIT = 5
"""Voxels: no smaller limit is put to strokes and gaps, however small the slice."""

TEXT_GROWTH = 2
"""Voxels that text is blanked beyond its edge, where smoothing or compression left a trace."""

RING = 3
"""Voxels: width of the surroundings that a blanked region takes its value from."""

MIN_CORNERS = 2
"""Corners of the slice that padding must reach; a fan may leave only two."""

MIN_OUTSIDE = 0.01
"""Of a slice's voxels, those of padding; less is a corner of air that happens to be clipped."""

MIN_AIR_SHARE = 0.25
"""Of the voxels next to padding, those of air from which padding takes its value."""

DARKEST, BRIGHTEST = 1.0, 99.0
"""Percentiles of the voxels inside the field of view that their range is taken between: foam of the
table (-750 HU) must not pass for air in a CT scan, however bright the metal in it."""

_EIGHT = np.ones((3, 3), dtype=bool)


def blank(
    voxels_CXYZ: Array,
    kinds: Collection[Kind],
    *,
    across: int,
    air_level: float | None = None,
    frames: bool = False,
) -> Array:
    """Return a copy of a scan with artifacts replaced by the background around them.

    The field of view comes first, so that its padding does not count into the range of values that
    text is told by. Channels are treated each alone.

    Args:
        voxels_CXYZ: (C, X, Y, Z); a 2D image has length one along ``across``.
        kinds: what to blank.
        across: 0, 1 or 2, the spatial axis that the slices were acquired along.
        air_level: value up to which a voxel is background; ``None``: a tenth of the range.
        frames: the channels are the frames of a cine; text then stands still in all of them.
    """
    result = voxels_CXYZ.copy()
    slices_CNXY = np.moveaxis(result, 1 + across, 1)
    for part_NXY in [slices_CNXY[:, 0]] if frames else slices_CNXY:
        stack_NXY = np.ascontiguousarray(part_NXY)
        if "field_of_view" in kinds:
            _blank_outside(stack_NXY, air_level)
        if "text" in kinds:
            _blank_text(stack_NXY, air_level, frames=frames)
        part_NXY[:] = stack_NXY
    return result


def outside_mask(stack_NXY: Array) -> Mask:
    """Find the padding around a circular or fan-shaped field of view.

    Padding holds exactly one value, the same in all slices or frames, and spreads from at least two
    corners of the slice.

    Not found: padding that differs from slice to slice (a volume resampled at an angle, a gantry
    tilt), padding with noise or compression in it, a fan that reaches three corners.

    Args:
        stack_NXY: (N, X, Y) slices of a volume, or frames of a cine.

    Returns:
        (X, Y), true in the padding; all false where there is none.
    """
    first = stack_NXY[0]
    steady = (stack_NXY == first).all(axis=0)
    corners = [(x, y) for x in (0, -1) for y in (0, -1)]
    found: list[tuple[int, int, Mask]] = []
    for value in np.unique([first[corner] for corner in corners]):
        labels, _ = ndimage.label(steady & (first == value))
        reached = [int(labels[corner]) for corner in corners if labels[corner]]
        region = np.isin(labels, reached) & (labels > 0)
        found.append((len(reached), int(region.sum()), region))
    num_corners, area, region = max(found, key=lambda item: item[:2])
    if num_corners < MIN_CORNERS or not MIN_OUTSIDE * region.size <= area < region.size:
        return np.zeros_like(region)
    return region


def text_mask(stack_NXY: Array, air_level: float | None = None, *, frames: bool = False) -> Mask:
    """Find burned-in letters and side markers.

    A letter is a connected region of one slice that is brighter than background and

    - holds the scan's maximum, which at least 16 voxels share, or is almost as bright and stands
      close to letters that do;
    - is small, and made of strokes: see the limits of this module;
    - lies in background that is connected to the border of the slice. Bone, metal and contrast
      agent within a body lie in tissue, or in air that a body encloses, and are left as they are;
    - in a cine, is the same in all frames.

    Not found: text over the body, or touching it; text on a background that is noisy or brighter
    than a tenth of the range; grey text, dark text, and words that lossy compression keeps from the
    maximum; lead markers that do not saturate; letters larger than the limits; numbers that change
    from frame to frame; coloured text of a colour cine. Wrongly found: saturated fine structures
    that lie isolated in background, such as vessels of a projection angiography: leave text on for
    those.

    Args:
        stack_NXY: (N, X, Y) slices of a volume, or frames of a cine.
        air_level: value up to which a voxel is background; ``None``: a tenth of the range.
        frames: the stack is a cine.

    Returns:
        (N, X, Y), true where text is, with a margin of `TEXT_GROWTH` voxels.
    """
    mask = np.zeros(stack_NXY.shape, dtype=bool)
    top = stack_NXY.max()
    level = _level(stack_NXY, air_level)
    saturated_NXY = stack_NXY == top
    if top <= level or saturated_NXY.sum() < MIN_SATURATED:
        return mask
    bright = float(stack_NXY.min()) * (1 - MIN_BRIGHTNESS) + float(top) * MIN_BRIGHTNESS
    if frames:
        # Brightest over time: what is background there is background in every frame.
        brightest, darkest = stack_NXY.max(axis=0), stack_NXY.min(axis=0)
        still = brightest == darkest
        mask[:] = _letters(brightest > level, darkest >= bright, darkest == top, still)
        return mask
    for index in np.flatnonzero(saturated_NXY.any(axis=(1, 2))):
        image = stack_NXY[index]
        foreground = image > level
        mask[index] = _letters(foreground, image >= bright, saturated_NXY[index], foreground)
    return mask


def _letters(foreground_XY: Mask, bright_XY: Mask, saturated_XY: Mask, still_XY: Mask) -> Mask:
    """Return the letters of a slice, with their margin.

    Args:
        foreground_XY: what is not background.
        bright_XY: what is bright enough for a letter.
        saturated_XY: what holds the maximum.
        still_XY: what does not change; a letter must lie in it entirely.
    """
    labels, count = ndimage.label(foreground_XY, structure=_EIGHT)
    side = max(foreground_XY.shape)
    limit = max(MIN_STROKE_LIMIT, MAX_STROKE * side)
    flat = labels.ravel()
    area, bright, still = (
        np.bincount(flat, weights=part.ravel(), minlength=count + 1)
        for part in (foreground_XY, bright_XY, still_XY)
    )
    is_letter = (bright > 0) & (still == area) & (area <= MAX_TEXT_AREA * foreground_XY.size)
    is_letter[0] = False  # background
    boxes = ndimage.find_objects(labels)
    for number in np.flatnonzero(is_letter):
        box = boxes[number - 1]
        extent = max(part.stop - part.start for part in box)
        is_letter[number] = (
            extent <= MAX_TEXT_EXTENT * side and _stroke(labels[box] == number) <= limit
        )
    if not is_letter.any():
        return np.zeros_like(foreground_XY)
    is_letter &= _lies_outside(foreground_XY, labels, count)
    letters = is_letter[labels]
    # A word: letters that meet when each grows by half of the widest gap.
    near = ndimage.binary_dilation(letters, structure=_EIGHT, iterations=int(limit + 1) // 2)
    words, _ = ndimage.label(near, structure=_EIGHT)
    letters &= np.isin(words, np.unique(words[letters & saturated_XY]))
    # What a letter encloses (the dot of a circled dot) belongs to it.
    letters = ndimage.binary_fill_holes(letters)
    grown = ndimage.binary_dilation(letters, structure=_EIGHT, iterations=TEXT_GROWTH)
    mask: Mask = letters | (grown & ~foreground_XY)
    return mask


def _stroke(letter_XY: Mask) -> float:
    """Return the width of the widest stroke, voxels."""
    depth = ndimage.distance_transform_edt(np.pad(letter_XY, 1))
    return 2 * float(depth.max()) - 1


def _lies_outside(foreground_XY: Mask, labels: npt.NDArray[np.int32], count: int) -> Mask:
    """Tell which regions of the foreground touch background that reaches the slice's border."""
    background, num_regions = ndimage.label(~foreground_XY)
    border = np.concatenate(
        [background[0], background[-1], background[:, 0], background[:, -1]], axis=None
    )
    is_open = np.zeros(num_regions + 1, dtype=bool)
    is_open[border] = True
    is_open[0] = False  # foreground
    touched = ndimage.binary_dilation(is_open[background], structure=_EIGHT)
    outside = np.zeros(count + 1, dtype=bool)
    outside[labels[touched]] = True
    return outside


def _level(values: Array, air_level: float | None) -> float:
    if air_level is not None:
        return air_level
    low, high = float(values.min()), float(values.max())
    return low + BACKGROUND_FRACTION * (high - low)


def _blank_text(stack_NXY: Array, air_level: float | None, *, frames: bool) -> None:
    """Give each letter, in place, the median of the background around it.

    The patch that is left is flat, where background has noise: much fainter than a letter, and not
    nothing.
    """
    mask_NXY = text_mask(stack_NXY, air_level, frames=frames)
    level = _level(stack_NXY, air_level)
    darkest = stack_NXY.min()
    for image_XY, mask_XY in zip(stack_NXY, mask_NXY, strict=True):
        if not mask_XY.any():
            continue
        around = ~mask_XY & (image_XY <= level)
        labels, _ = ndimage.label(mask_XY, structure=_EIGHT)
        for number, box in enumerate(ndimage.find_objects(labels), start=1):
            wide = tuple(slice(max(0, part.start - RING), part.stop + RING) for part in box)
            letter = labels[wide] == number
            ring = ndimage.binary_dilation(letter, structure=_EIGHT, iterations=RING) & around[wide]
            part_XY = image_XY[wide]
            part_XY[letter] = np.median(part_XY[ring]) if ring.any() else darkest


def _blank_outside(stack_NXY: Array, air_level: float | None) -> None:
    """Give padding, in place, the median of the air next to it.

    Where too little air is next to it (a fan, whose rim lies in tissue; a circle through the table)
    it takes the first percentile of what lies inside.

    The padding's own value is gone after this: it no longer reads as a second kind of air, and no
    longer stretches the range that intensities are scaled by. What stays: padding is flat where air
    has noise, a faint edge; and where the circle or fan cuts through anatomy, its rim is as visible
    as before. Cropping to an inscribed square would remove it, and anatomy with it, so that is left
    to the size of the crop.
    """
    outside_XY = outside_mask(stack_NXY)
    if not outside_XY.any():
        return
    low, high = np.percentile(stack_NXY[:, ~outside_XY], (DARKEST, BRIGHTEST))
    level = low + BACKGROUND_FRACTION * (high - low)
    if air_level is not None:
        level = min(level, air_level)
    rim_XY = ndimage.binary_dilation(outside_XY, structure=_EIGHT, iterations=RING) & ~outside_XY
    rim = stack_NXY[:, rim_XY]
    air = rim[rim <= level]
    enough = air.size >= MIN_AIR_SHARE * rim.size
    stack_NXY[:, outside_XY] = np.median(air) if enough else low
