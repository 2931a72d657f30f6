"""Weight files that would run code: a payload that makes a file shows whether it ran."""

from __future__ import annotations

import io
import os
import pickle
from pathlib import Path

import torch


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (os.system, (f"touch {self.mark}",))


def hostile_files(mark: Path) -> dict[str, bytes]:
    """Return contents of files, by how they were written, that make ``mark`` when unpickled."""
    content = {"state_dict": {"net.conv1.weight": torch.zeros(1)}, "payload": Bomb(mark)}
    zipped, legacy = io.BytesIO(), io.BytesIO()
    torch.save(content, zipped)
    torch.save(content, legacy, _use_new_zipfile_serialization=False)
    return {
        "torch": zipped.getvalue(),
        "torch, before 1.6": legacy.getvalue(),
        "pickle": pickle.dumps(content),
    }
