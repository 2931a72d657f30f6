"""What the flags of index rows mean."""

from __future__ import annotations

import difflib
import re
from typing import Annotated

from pydantic import AfterValidator

FLAGS: dict[str, str] = {
    "alpha_dropped": "Its transparency channel was left out.",
    "beyond_float32": "Some values are too large or too fine for float32 and were rounded.",
    "burned_in_annotation": "The file says that its pixels show text, perhaps a name.",
    "burned_in_possible": "Images of its kind often show text in their pixels, perhaps a name.",
    "colour": "Red, green and blue are its three channels.",
    "derived_primary": "Processed by the scanner, yet the only form in which it was sent.",
    "fourth_axis_assumed_time": "It does not say what its fourth axis is: taken for time.",
    "fourth_axis_channels": "Its fourth axis is read as channels.",
    "fourth_axis_time": "Its fourth axis is read as time points.",
    "gantry_tilt_resampled": "The slices leaned and were straightened, as the config asked.",
    "incomplete_series": "A file of its series could not be read; the stack itself is even.",
    "irregular_spacing_allowed": "Gaps between slices differ as much as the config allows.",
    "irregular_spacing_resampled": "Slices were interpolated to even gaps, as the config asked.",
    "label_intent": "The file says that its values are labels.",
    "lossy": "It was compressed with loss before it was sent.",
    "may_show_face": "A scan of a head, from which a face could be drawn.",
    "missing_slice_resampled": "A missing slice was interpolated, as the config asked.",
    "monochrome1": "Stored with dark for high values (MONOCHROME1).",
    "no_patient_geometry": "It does not say how it lies in the patient; its axes are its own.",
    "patient_from_path": "Its patient was read from the names of folders (BIDS).",
    "patient_unknown": "It names no patient and is taken for a person of its own.",
    "pixdim_differs": "Its voxel sizes disagree with its sform; the sform is used.",
    "sform_qform_differ": "Two geometries in the file disagree; the sform is used.",
    "sidecar_unreadable": "The JSON file beside it cannot be read and was left out.",
    "spacing_unknown": "The size of its pixels is unknown and taken for 1 mm.",
    "ultrasound_regions": "An ultrasound screen: the rim around the image often shows a name.",
}
"""Flags of the index, each with its meaning."""

SHOWS_IDENTITY = frozenset(
    {"burned_in_annotation", "burned_in_possible", "ultrasound_regions", "may_show_face"}
)
"""Flags of scans by whose pixels a person may be recognised: these are never pictured."""


def _known(flag: str) -> str:
    if flag not in FLAGS:
        near = difflib.get_close_matches(flag, FLAGS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"there is no flag {flag!r}.{hint} There are: {', '.join(FLAGS)}")
    return flag


Flag = Annotated[str, AfterValidator(_known)]
"""A flag in a config: a misspelt one would let through what it should hold back."""

_WARNING = re.compile(r"dicom_warning(?:_([0-9a-f]{4})_([0-9a-f]{4}))?")


def meaning_of_flag(flag: str) -> str:
    """Return what a flag means; "" for one that a format outside medssl set."""
    if match := _WARNING.fullmatch(flag):
        tag = f" about tag ({match[1]},{match[2]})" if match[1] else ""
        return f"The DICOM reader gave a warning{tag}."
    return FLAGS.get(flag, "")
