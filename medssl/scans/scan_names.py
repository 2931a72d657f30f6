"""By which names the owner of scans calls them: file, folder, scan key, series, patient.

Names are matched here and go no further: what comes out is named by scan key.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Literal

from medssl.errors import LabelError
from medssl.scans.index import Index
from medssl.scans.patients import names_of, stem_of

By = Literal["scan", "series", "patient"]

MEANING: dict[By, str] = {
    "scan": "the scan's file name, its path below the indexed folder (for a DICOM series: of its "
    "folder), or its scan key",
    "series": "SeriesInstanceUID",
    "patient": "PatientID, or the name that `patients` in the index config gives",
}


class ScanNames:
    """Finds the accepted scans that a name stands for.

    Args:
        index: the scans.
        by: what names are about.
    """

    def __init__(self, index: Index, by: By) -> None:
        self._index, self._by = index, by
        self._keys: dict[str, list[str]] = defaultdict(list)
        accepted = index.accepted
        if by == "scan":
            for key, path, num_files in index.file_names():
                for name in {key, *names_of(path, single=num_files == 1)}:
                    self._keys[name].append(key)
            return
        for key, named in zip(accepted["scan_key"], accepted[f"{by}_key"], strict=True):
            if named:
                self._keys[named].append(key)

    def find(self, name: str) -> list[str]:
        """Return the keys of the scans that a name stands for; of one at most, by scan.

        Raises:
            LabelError: a name of a scan fits several.
        """
        if self._by != "scan":
            return self._keys.get(self._index.salt.key(self._by, name), [])
        keys = self._keys.get(name) or self._keys.get(stem_of(name)) or []
        if len(keys) > 1:
            raise LabelError(
                f"one name fits {len(keys)} scans (keys {', '.join(sorted(keys)[:3])}). "
                "Name scans by their path below the indexed folder, or by scan key."
            )
        return keys
