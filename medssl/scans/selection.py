"""Which scans of an index a run works on: an archive holds more kinds than one task can take."""

from __future__ import annotations

import pandas as pd

from medssl.config import Config
from medssl.scans.flags import Flag
from medssl.scans.formats.base import Dims


class SelectionConfig(Config):
    """What a scan must be.

    Attributes:
        dims: 2D, 3D, 2D+t (cines).
        num_channels: 1 for grey scans, 3 for colour; None takes any.
        modalities: for example CT, MR; None takes any.
        without_flags: scans with one of these flags are left out, for example
            ``burned_in_possible``; ``medssl audit`` shows them.
    """

    dims: tuple[Dims, ...] = ("2D", "3D")
    num_channels: int | None = 1
    modalities: tuple[str, ...] | None = None
    without_flags: tuple[Flag, ...] = ()

    def keep(self, table: pd.DataFrame) -> pd.Series[bool]:
        """Return which rows of an index fit."""
        kept = table["dims"].isin(self.dims)
        if self.num_channels is not None:
            kept &= table["num_channels"] == self.num_channels
        if self.modalities is not None:
            kept &= table["modality"].isin(self.modalities)
        unwanted = set(self.without_flags)
        return kept & ~table["flags"].map(lambda flags: bool(unwanted & set(flags))).astype(bool)
