"""What properties are stated over. Shrinks towards small, plain cases."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

from samples import rotation_affine


def shapes(min_side: int = 2, max_side: int = 6) -> SearchStrategy[tuple[int, int, int]]:
    """Return shapes of small volumes."""
    side = st.integers(min_side, max_side)
    return st.tuples(side, side, side)


@st.composite
def affines(draw: DrawFn) -> np.ndarray:
    """Return voxel to RAS affines with perpendicular axes: any turn, spacing, origin and mirror."""
    angles = draw(st.tuples(*[st.floats(-180, 180, width=32)] * 3))
    spacing_mm = draw(st.tuples(*[st.floats(0.25, 8, width=32)] * 3))
    origin_mm = draw(st.tuples(*[st.floats(-300, 300, width=32)] * 3))
    affine = rotation_affine(angles, spacing_mm, origin_mm)
    mirror = draw(st.sampled_from([1.0, -1.0]))
    affine[:3, 2] *= mirror
    return affine


def patients(min_size: int = 3, max_size: int = 60) -> SearchStrategy[dict[str, str | None]]:
    """Return patient keys with a class each."""
    keys = st.text("0123456789abcdef", min_size=4, max_size=8)
    return st.dictionaries(
        keys, st.sampled_from(["a", "b", "c", None]), min_size=min_size, max_size=max_size
    )
